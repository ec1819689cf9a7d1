#!/usr/bin/env bash
# The whole recipe on one machine with CUDA GPUs:
#   training/run.sh TEACHER.gguf CHITCHAT.json OUT [SECONDS_OF_GENERATION] [SECONDS_IN_ALL] [OLDER_TEACHER_TEXT]
# OUT gets corpus/ (the teacher's text), data/ (tokenizer, rows, held-out documents) and model/ (the bf16 checkpoint).
set -euo pipefail
teacher=$1 chitchat=$2 out=$3 generate=${4:-200} all=${5:-1500} older=${6:-}
gpus=$(nvidia-smi -L | wc -l)
export PYTHONUNBUFFERED=1
cd "$(dirname "$0")/.."
mkdir -p "$out/corpus" "$out/empty"
for ((i = 0; i < gpus; i++)); do
  python3 -m training.generate "$teacher" "$out/corpus" --seconds "$generate" --part "$i" &
done
wait
if [ -n "$older" ]; then cp "$older"/corpus.jsonl.*.xz "$out/corpus"; fi
# Compiling takes as long as preparing, and needs other parts of the machine: a run on nothing fills the caches meanwhile.
python3 - "$out/empty" <<'END'
import json, sys
from pathlib import Path
import numpy as np
folder, r = Path(sys.argv[1]), np.random.default_rng(1)
for name, rows in (("train", 512), ("heldout", 128)):
    np.save(folder / f"{name}.npy", r.integers(0, 8192, (rows, 1025)).astype(np.uint16))
for name in ("counts.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    (folder / name).write_text("{}")
END
torchrun --nproc-per-node "$gpus" -m training.train "$out/empty" "$out/empty" --seconds 4 --epochs 100000 > "$out/empty/log" 2>&1 &
python3 -m training.prepare "$out/data" --teacher "$out/corpus" --chitchat "$chitchat"
wait
train=$((all - SECONDS - 60)) # loading what was compiled takes a minute
echo "training for $train seconds"
torchrun --nproc-per-node "$gpus" -m training.train "$out/data" "$out/model" --seconds "$train"
rm -r "$out/empty"
