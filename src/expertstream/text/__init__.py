"""Texts that a model writes under a schema: what a schema allows, the grammar that holds a model to it, and the reading back."""
