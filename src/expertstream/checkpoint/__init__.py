"""Checkpoints as they lie on disk: safetensors of the Hugging Face and MLX kinds, and our own packs."""
