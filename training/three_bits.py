"""A checkpoint whose experts are rounded to 3 bits, as numbers: no format of ours stores 3 bits, and the model card compares with them.
Run: python -m training.three_bits MODEL OUT. OUT is float32 safetensors; `training.perplexity` reads it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import from_numpy

GROUP = 64
LEVELS = 7


def rounded(w: np.ndarray) -> np.ndarray:
    """Affine in groups of 64 columns: of eight ranges, from the whole one down to 72 % of it, the one of least squared error, as `convert`
    does."""
    groups = w.reshape(-1, GROUP)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    best, error = groups, np.full((len(groups), 1), np.inf, np.float32)
    for shrink in np.linspace(1.0, 0.72, 8, dtype=np.float32):
        middle, half = (high + low) / 2, (high - low) / 2 * shrink
        step = np.maximum(2 * half / LEVELS, 1e-12)
        found = np.clip(np.rint((groups - (middle - half)) / step), 0, LEVELS) * step + (middle - half)
        off = np.square(found - groups).sum(1, keepdims=True)
        best, error = np.where(off < error, found, best), np.minimum(off, error)
    return best.reshape(w.shape).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.float() for k, v in load_file(args.model / "model.safetensors").items()}
    for name, w in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = from_numpy(rounded(w.numpy()))
    save_file(tensors, args.out / "model.safetensors")
    for file in args.model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, args.out)


if __name__ == "__main__":
    main()
