"""Benchmarks and tools: synthetic checkpoints, measurements of a machine and of the engine on it, predictions, plots."""
