"""Trains the embedded model on one CUDA GPU. Run: python -m training.train DATA_DIR OUT_DIR [--seconds N]

Muon for matrices, AdamW for the rest (learning rate flat for 35 %, then linear to 0 at the end of the time given),
bfloat16 compute with float32 masters. Writes OUT_DIR/model.safetensors (bf16, Hugging Face names), config.json and
log.json: losses, expert shares, seeds, versions, data fingerprints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .model import Model, linear

torch._dynamo.config.recompile_limit = 64  # newton_schulz meets a dozen shapes
SEED = 20261125
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
FLAT = 0.35
BALANCE = 0.01
MAX_EPOCHS = 4.0


@torch.compile
def newton_schulz(m: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix of each (…, rows, cols), by Muon's quintic iteration in bf16 (K. Jordan, 2024)."""
    x = m.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the update's size is 0.2·√(max(rows, cols)), so that AdamW's learning rate fits it."""

    def __init__(
        self, params: list[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = newton_schulz(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def loss_of(model: Model, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, balance, shares = model(rows[:, :-1])
    return head_loss(hidden, model.model.embed_tokens.weight, rows[:, 1:]), balance, shares


@torch.compile
def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(linear(hidden, weight).float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: Model, rows: torch.Tensor, batch: int) -> tuple[float, torch.Tensor]:
    losses, shares = [], []
    for i in range(0, len(rows) - batch + 1, batch):
        loss, _, share = loss_of(model, rows[i : i + batch])
        losses.append(loss.item())
        shares.append(share)
    return float(np.mean(losses)), torch.stack(shares).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="training time after compilation")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    config = json.loads((Path(__file__).parent / "config.json").read_text())
    train = torch.from_numpy(np.load(args.data / "train.npy").astype(np.int64)).cuda()
    heldout = torch.from_numpy(np.load(args.data / "heldout.npy").astype(np.int64)).cuda()[: 4 * args.batch]
    model = Model(config).cuda()
    for layer in model.model.layers:
        layer.compile(dynamic=False)

    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim >= 2 and not any(s in n for s in ("embed_tokens", "conv1d", "gate.weight"))
    ]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = Muon(matrices, lr=LEARNING_RATE)
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    order = np.random.default_rng(SEED)
    permutation, cursor, step, epoch, best, log = order.permutation(len(train)), 0, 0, 0.0, float("inf"), []
    loss_of(model, train[: args.batch])[0].backward()  # compile before the clock starts
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    begin, next_eval = time.monotonic(), 60.0
    print(f"compiled; {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    while True:
        elapsed = time.monotonic() - begin
        done = max(elapsed / args.seconds, epoch / MAX_EPOCHS)
        if done < 1:
            if cursor + args.batch > len(permutation):
                permutation, cursor = order.permutation(len(train)), 0
            rows = train[torch.from_numpy(permutation[cursor : cursor + args.batch]).cuda()]
            cursor += args.batch
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (1 - done) / (1 - FLAT))
            for optimizer in (muon, adamw):
                optimizer.param_groups[0]["lr"] = rate
            loss, balance, _ = loss_of(model, rows)
            (loss + BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step()
            adamw.step()
            model.zero_grad(set_to_none=True)
            step += 1
            epoch = step * args.batch / len(train)
        if step % 50 == 0:
            loss.item()  # keeps the host from running far ahead of the device, so that the clock is honest
        if elapsed > next_eval or done >= 1:
            next_eval = elapsed + 60
            held, shares = evaluate(model, heldout, args.batch)
            shares *= config["num_experts"]
            entry = {
                "seconds": round(elapsed, 1), "step": step, "epoch": round(epoch, 3), "train_loss": round(loss.item(), 4),
                "heldout_loss": round(held, 4), "balance": round(balance.item(), 4),
                "busiest_expert": round(shares.max().item(), 3), "idlest_expert": round(shares.min().item(), 3),
                "tokens_per_second": round(step * args.batch * 1024 / elapsed),
            }  # fmt: skip
            log.append(entry)
            print(json.dumps(entry), flush=True)
            if held < best:
                best = held
                state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
                save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
        if done >= 1:
            break
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(args.data / name, args.out / name)
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    fingerprints = {
        n: hashlib.sha256((args.data / n).read_bytes()).hexdigest()
        for n in ("train.npy", "heldout.npy", "tokenizer.json")
    }
    record = {
        "seed": SEED, "torch": torch.__version__, "device": torch.cuda.get_device_name(), "sha256": fingerprints,
        "best_heldout_loss": best, "log": log,
    }  # fmt: skip
    (args.out / "log.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
