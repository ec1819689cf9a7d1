"""NVIDIA GPUs: kernels in CUDA C++, compiled when they are first needed, and the driver behind a small interface."""
