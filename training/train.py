"""Trains the embedded model. Run: torchrun --nproc-per-node GPUS -m training.train DATA_DIR OUT_DIR [--seconds N]

On one GPU `python -m training.train …` does. The clock starts when all is compiled.

Muon for matrices, AdamW for the rest (learning rate flat for 35 %, then linear to 0 at the end of the time given),
bfloat16 compute with float32 masters. Writes OUT_DIR/model.safetensors (bf16, Hugging Face names), config.json and
log.json: losses, expert shares, seeds, versions, data fingerprints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .model import Model, linear, use_library
from .prepare import READ_ONLY

torch._dynamo.config.recompile_limit = 64  # newton_schulz meets several shapes
SEED = 20261125
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
FLAT = 0.35
BALANCE = 0.01


@torch.compile
def newton_schulz(m: Tensor) -> Tensor:
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

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():  # all of one shape at once: the host has little to do
                buffers, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = newton_schulz(torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * 0.2 * max(params[0].shape[-2:]) ** 0.5
                torch._foreach_sub_(params, list((update.to(params[0].dtype) * scale).unbind()))


def loss_of(model: Model, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows (B, 1025) as prepared: loss over the tokens that are learned, balance loss, shares (layers, experts)."""
    tokens = rows & (READ_ONLY - 1)
    hidden, balance, shares = model(tokens[:, :-1])
    targets = torch.where(rows[:, 1:] < READ_ONLY, tokens[:, 1:], -100)
    return head_loss(hidden, model.model.embed_tokens.weight, targets), balance, shares


@torch.compile
def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(linear(hidden, weight).float().flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def evaluate(model: Model, rows: Tensor, batch: int) -> tuple[float, Tensor]:
    losses, shares = [], []
    for i in range(0, len(rows) - batch + 1, batch):
        loss, _, share = loss_of(model, rows[i : i + batch])
        losses.append(loss)
        shares.append(share)
    return torch.stack(losses).mean().item(), torch.stack(shares).mean(0)


def share_gradients(model: Model, world: int) -> None:
    """The mean over the GPUs."""
    if world > 1:
        grads = [p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        torch._foreach_copy_(
            grads, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=400, help="training time after compilation")
    parser.add_argument("--epochs", type=float, default=4.0, help="at most so many")
    parser.add_argument("--batch", type=int, default=64, help="rows a GPU and step")
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(rank)
    if world > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    rule = use_library()
    torch.manual_seed(SEED)  # the same first weights on every GPU
    config = json.loads((Path(__file__).parent / "config.json").read_text())
    train = torch.from_numpy(np.load(args.data / "train.npy").astype(np.int32)).cuda()
    heldout = torch.from_numpy(np.load(args.data / "heldout.npy").astype(np.int32)).cuda()
    heldout = heldout[: len(heldout) // args.batch * args.batch]
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
    per_step = args.batch * world
    permutation, cursor, step, epoch, best, log = order.permutation(len(train)), 0, 0, 0.0, float("inf"), []
    for _ in range(2):  # compile before the clock starts
        loss_of(model, train[: args.batch].long())[0].backward()
        share_gradients(model, world)
        muon.param_groups[0]["lr"] = 0.0
        muon.step()
        model.zero_grad(set_to_none=True)
    evaluate(model, heldout.long(), args.batch)
    for state in muon.state.values():
        state["momentum"].zero_()
    torch.cuda.synchronize()
    begin, next_eval, done, pace = time.monotonic(), 60.0, 0.0, 0.0
    if rank == 0:
        print(f"{rule}\n{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} rows", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
    loss = balance = torch.zeros(())
    while True:
        if step and step % 50 == 0:  # all GPUs agree on how much is done, and how much of it a step is
            loss.item()
            elapsed = time.monotonic() - begin
            progress = torch.tensor(
                [max(elapsed / args.seconds, epoch / args.epochs)], device="cuda", dtype=torch.float64
            )
            if world > 1:
                dist.broadcast(progress, 0)
            pace, done = progress.item() / step, progress.item()
            if elapsed > next_eval or done >= 1:
                next_eval = elapsed + 60
                held, shares = evaluate(model, heldout.long(), args.batch)
                shares *= config["num_experts"]
                entry = {
                    "seconds": round(elapsed, 1), "step": step, "epoch": round(epoch, 3), "train_loss": round(loss.item(), 4),
                    "heldout_loss": round(held, 4), "balance": round(balance.item(), 4),
                    "busiest_expert": round(shares.max().item(), 3), "idlest_expert": round(shares.min().item(), 3),
                    "tokens_per_second": round(step * per_step * 1024 / elapsed),
                }  # fmt: skip
                log.append(entry)
                if rank == 0:
                    print(json.dumps(entry), flush=True)
                    if held < best:
                        best = held
                        state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
                        save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
            if done >= 1:
                break
        if cursor + per_step > len(permutation):
            permutation, cursor = order.permutation(len(train)), 0
        mine = permutation[cursor + rank * args.batch : cursor + (rank + 1) * args.batch]
        cursor += per_step
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.0, 1 - done) / (1 - FLAT))
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate
        loss, balance, _ = loss_of(model, train[torch.from_numpy(mine).cuda()].long())
        (loss + BALANCE * balance).backward()
        share_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        model.zero_grad(set_to_none=True)
        step += 1
        done += pace
        epoch = step * per_step / len(train)
    if rank == 0:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(args.data / name, args.out / name)
        (args.out / "config.json").write_text(json.dumps(config, indent=1))
        files = ("train.npy", "heldout.npy", "tokenizer.json")
        record = {
            "seed": SEED, "torch": torch.__version__, "device": f"{world} × {torch.cuda.get_device_name()}", "rule": rule,
            "sha256": {n: hashlib.sha256((args.data / n).read_bytes()).hexdigest() for n in files},
            "documents": json.loads((args.data / "counts.json").read_text()), "best_heldout_loss": best, "log": log,
        }  # fmt: skip
        (args.out / "log.json").write_text(json.dumps(record, indent=1))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
