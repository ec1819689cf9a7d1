"""Structured model output: schemas, the grammars that constrain a model to them, and the parsers that read its output."""
