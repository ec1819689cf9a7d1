"""Serving: what a model writes as API events. HTTP comes on top."""
