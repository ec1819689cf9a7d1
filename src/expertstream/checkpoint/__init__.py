"""Checkpoints on disk: safetensors in the Hugging Face and MLX conventions, and our own packs."""
