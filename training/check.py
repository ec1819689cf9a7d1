"""Compares training/model.py with Hugging Face's Qwen3_5MoeForCausalLM on the CPU. Run: python -m training.check"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from . import model as ours


def main() -> None:
    torch.manual_seed(0)
    ours.COMPUTE = torch.float32
    config = json.loads((Path(__file__).parent / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "layer_types": config["layer_types"][:4], "vocab_size": 512}
    ours_model = ours.Model(config)
    for p in ours_model.parameters():  # nothing may hide behind a zero or a one
        p.data += torch.randn_like(p) * 0.05
    theirs = (
        Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{k: v for k, v in config.items() if k != "dtype"})).float().eval()
    )
    missing, unexpected = theirs.load_state_dict(ours_model.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    theirs.tie_weights()
    tokens = torch.randint(0, 512, (2, 150))
    with torch.no_grad():
        a, b = ours_model.logits(tokens), theirs(tokens).logits
    error = ((a - b).norm() / b.norm()).item()
    print(f"relative difference of the logits: {error:.2e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
