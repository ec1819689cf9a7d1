"""A trainable Qwen3.5-MoE: Hugging Face parameter names, PyTorch forward written for speed on one GPU.

The arithmetic is that of `transformers.models.qwen3_5_moe`; `training/check.py` compares the two. Differences are
only in how it is computed: experts as grouped matrix products, the gated-delta rule in chunks with one triangular
solve a chunk, float32 parameters cast to bfloat16 where they are used.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPUTE = torch.bfloat16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(COMPUTE), weight.to(COMPUTE))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x·rsqrt(mean(x²)+eps)·(1+weight), in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)


def gated_delta_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunk: int = 64) -> Tensor:
    """The gated-delta rule over whole sequences. q, k (B, H, T, dk), v (B, H, T, dv), g, beta (B, H, T), float32.

    Within a chunk, d_i = β_i(v_i − e^{γ_i} S₀ᵀk_i) − Σ_{j<i} β_i e^{γ_i−γ_j}(k_i·k_j) d_j is a triangular system with
    one matrix for every column of d, so it is solved once for [βv | β e^γ k] and the state enters afterwards.
    """
    B, H, T, dk = q.shape
    dv = v.shape[-1]
    pad = -T % chunk
    if pad:
        q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (q, k, v))
        g, beta = F.pad(g, (0, pad)), F.pad(beta, (0, pad))
    N = (T + pad) // chunk
    q, k, v = (t.reshape(B * H, N, chunk, -1) for t in (q, k, v))
    g, beta = g.reshape(B * H, N, chunk), beta.reshape(B * H, N, chunk, 1)
    gamma = g.cumsum(-1)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = torch.exp((gamma[..., :, None] - gamma[..., None, :]).masked_fill(~lower, float("-inf")))
    e_gamma = gamma.exp()[..., None]
    k_beta = k * beta
    a = (k_beta @ k.transpose(-1, -2)) * decay
    solved = torch.linalg.solve_triangular(
        a, torch.cat([v * beta, k_beta * e_gamma], -1), upper=False, unitriangular=True
    )
    u, w = solved.split([dv, dk], -1)
    scores = (q @ k.transpose(-1, -2)) * decay
    q_decayed = q * e_gamma
    k_tail = (k * torch.exp(gamma[..., -1:] - gamma)[..., None]).transpose(-1, -2)
    chunk_decay = gamma[..., -1].exp()[..., None, None]
    state = torch.zeros(B * H, dk, dv, dtype=q.dtype, device=q.device)
    outs = []
    for n in range(N):
        d = u[:, n] - w[:, n] @ state
        outs.append(q_decayed[:, n] @ state + scores[:, n] @ d)
        state = state * chunk_decay[:, n] + k_tail[:, n] @ d
    return torch.stack(outs, 1).reshape(B, H, T + pad, dv)[:, :, :T]


try:  # PyPI's flash-linear-attention, if it is there: three times as fast
    from fla.ops.common import chunk_o as _chunk_o
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as _fla_rule
except ImportError:
    _fla_rule = None


def use_library() -> str:
    """Takes the library's gated-delta rule if its gradients are right on this GPU; says what was found.

    Version 0.6.0 refuses to run on Hopper with Triton 3.4 to 3.7.0, because one kernel computes wrong gradients there
    (its issue 640). With two warps that kernel is right, so it is held to two, and compared with float32 here.
    """
    if _fla_rule is None:
        return "flash-linear-attention is not installed; the rule is PyTorch's"
    kernel = _chunk_o.chunk_bwd_kernel_dqkwg
    while not hasattr(kernel, "configs"):
        kernel = kernel.fn
    kernel.configs = [c for c in kernel.configs if c.num_warps == 2]
    _chunk_o.TRITON_ABOVE_3_7_1 = True
    torch.manual_seed(0)
    shapes = ((4, 256, 3, 64), (4, 256, 3, 64), (4, 256, 6, 64))
    q, k, v = (torch.randn(s, device="cuda") for s in shapes)
    q, k = F.normalize(q, dim=-1) / 8, F.normalize(k, dim=-1)
    g, beta = -torch.rand(4, 256, 6, device="cuda") * 0.3, torch.rand(4, 256, 6, device="cuda")
    weight = torch.randn(4, 256, 6, 64, device="cuda")
    results = []
    for rule, dtype in ((plain_rule, torch.float32), (library_rule, COMPUTE)):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)] + [t.clone().requires_grad_() for t in (g, beta)]
        out = rule(*inputs)
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), inputs)])
    errors = [((b.float() - a.float()).norm() / a.float().norm()).item() for a, b in zip(*results, strict=True)]
    if max(errors) < 0.02:
        GatedDeltaNet.rule = staticmethod(library_rule)
        return f"flash-linear-attention's rule; output and gradients against float32: {max(errors):.1e}"
    return f"flash-linear-attention is wrong here ({errors}); the rule is PyTorch's"


def plain_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k (B, T, Hk, dk), v (B, T, Hv, dv), g, beta (B, T, Hv) → (B, T, Hv, dv), float32."""
    repeat = v.shape[2] // q.shape[2]
    q, k = (t.float().repeat_interleave(repeat, 2).transpose(1, 2) for t in (q, k))
    return gated_delta_chunks(q, k, v.float().transpose(1, 2), g.transpose(1, 2), beta.transpose(1, 2)).transpose(1, 2)


def library_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    out, _ = _fla_rule(q.to(COMPUTE), k.to(COMPUTE), v.to(COMPUTE), g, beta, scale=1.0)
    return out.float()


class GatedDeltaNet(nn.Module):
    rule = staticmethod(plain_rule)

    def __init__(self, c: dict) -> None:
        super().__init__()
        h = c["hidden_size"]
        self.hk, self.hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        self.dk, self.dv = c["linear_key_head_dim"], c["linear_value_head_dim"]
        self.eps, self.kernel = c["rms_norm_eps"], c["linear_conv_kernel_dim"]
        channels = 2 * self.hk * self.dk + self.hv * self.dv
        self.in_proj_qkv = nn.Linear(h, channels, bias=False)
        self.in_proj_z = nn.Linear(h, self.hv * self.dv, bias=False)
        self.in_proj_a = nn.Linear(h, self.hv, bias=False)
        self.in_proj_b = nn.Linear(h, self.hv, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, self.kernel, groups=channels, bias=False)
        dt = torch.exp(torch.rand(self.hv) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.log(torch.rand(self.hv) * 15 + 1))
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(self.dv))
        self.out_proj = nn.Linear(self.hv * self.dv, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = linear(x, self.in_proj_qkv.weight)
        # A depthwise convolution of four taps is four shifted products; cheaper to fuse than a library call.
        taps = self.conv1d.weight[:, 0].float()
        padded = F.pad(qkv, (0, 0, self.kernel - 1, 0)).float()
        qkv = F.silu(sum(padded[:, i : i + T] * taps[:, i] for i in range(self.kernel)))
        q, k, v = qkv.split([self.hk * self.dk, self.hk * self.dk, self.hv * self.dv], -1)
        q, k = (t.view(B, T, self.hk, self.dk) for t in (q, k))
        q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        v = v.view(B, T, self.hv, self.dv)
        beta = torch.sigmoid(linear(x, self.in_proj_b.weight).float())
        a = linear(x, self.in_proj_a.weight).float()
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias)
        o = self.rule(q * self.dk**-0.5, k, v, g, beta)
        o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + self.eps) * self.norm.weight
        z = linear(x, self.in_proj_z.weight).view(B, T, self.hv, self.dv)
        return linear((o * F.silu(z.float())).reshape(B, T, -1), self.out_proj.weight)


class Attention(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        h, d = c["hidden_size"], c["head_dim"]
        self.heads, self.kv_heads, self.d, self.eps = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            d,
            c["rms_norm_eps"],
        )
        rope = c["rope_parameters"]
        self.rot = int(d * rope["partial_rotary_factor"])
        self.theta = rope["rope_theta"]
        self.q_proj = nn.Linear(h, self.heads * d * 2, bias=False)
        self.k_proj = nn.Linear(h, self.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(h, self.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, h, bias=False)
        self.q_norm, self.k_norm = nn.Module(), nn.Module()
        self.q_norm.weight = nn.Parameter(torch.zeros(d))
        self.k_norm.weight = nn.Parameter(torch.zeros(d))

    def rope(self, x: Tensor) -> Tensor:
        T, half = x.shape[1], self.rot // 2
        inv = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(T, device=x.device, dtype=torch.float32)[:, None] * inv
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        x1, x2, rest = x[..., :half], x[..., half : self.rot], x[..., self.rot :]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, gate = linear(x, self.q_proj.weight).view(B, T, self.heads, 2 * self.d).chunk(2, -1)
        k = linear(x, self.k_proj.weight).view(B, T, self.kv_heads, self.d)
        v = linear(x, self.v_proj.weight).view(B, T, self.kv_heads, self.d)
        q = self.rope(rms_norm(q, self.q_norm.weight, self.eps)).to(COMPUTE).transpose(1, 2)
        k = self.rope(rms_norm(k, self.k_norm.weight, self.eps)).to(COMPUTE).transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        o = o.transpose(1, 2) * torch.sigmoid(gate)
        return linear(o.reshape(B, T, -1), self.o_proj.weight)


class Experts(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        e, h, i = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * i, h) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(e, h, i) * 0.02)

    def forward(self, x: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        T, top_k = selected.shape
        flat = selected.reshape(-1)
        order = torch.argsort(flat, stable=True)
        inverse = torch.argsort(order)
        experts = torch.arange(self.gate_up_proj.shape[0], device=x.device)
        ends = (flat[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
        xs = x.to(COMPUTE)[order // top_k]
        gate_up = grouped(xs, self.gate_up_proj.to(COMPUTE).transpose(1, 2), ends)
        gate, up = gate_up.chunk(2, -1)
        y = grouped(F.silu(gate) * up, self.down_proj.to(COMPUTE).transpose(1, 2), ends)
        return (y[inverse].view(T, top_k, -1) * weights.to(COMPUTE)[..., None]).sum(1)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x in consecutive groups, each times its own matrix: (M, K) × (E, K, N) → (M, N)."""
    if x.is_cuda:
        return torch._grouped_mm(x, weight, offs=ends)
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ weight[e] for e, (a, b) in enumerate(itertools.pairwise(starts))])


class SharedExpert(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        h, i = c["hidden_size"], c["shared_expert_intermediate_size"]
        self.gate_proj = nn.Linear(h, i, bias=False)
        self.up_proj = nn.Linear(h, i, bias=False)
        self.down_proj = nn.Linear(i, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.silu(linear(x, self.gate_proj.weight)) * linear(x, self.up_proj.weight), self.down_proj.weight)


class SparseMoeBlock(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.top_k = c["num_experts_per_tok"]
        self.gate = nn.Linear(c["hidden_size"], c["num_experts"], bias=False)
        self.experts = Experts(c)
        self.shared_expert = SharedExpert(c)
        self.shared_expert_gate = nn.Linear(c["hidden_size"], 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output, the balance loss, and the share of choices per expert."""
        B, T, H = x.shape
        x = x.reshape(-1, H)
        probs = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        weights, selected = probs.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        experts = torch.arange(probs.shape[1], device=x.device)
        share = (selected.reshape(-1, 1) == experts).float().mean(0)
        balance = probs.shape[1] * (share * probs.mean(0)).sum()
        y = self.experts(x, selected, weights)
        y = y + torch.sigmoid(linear(x, self.shared_expert_gate.weight)) * self.shared_expert(x)
        return y.view(B, T, H), balance, share


class DecoderLayer(nn.Module):
    def __init__(self, c: dict, kind: str) -> None:
        super().__init__()
        h, self.eps = c["hidden_size"], c["rms_norm_eps"]
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = Attention(c)
        self.mixer_name = "linear_attn" if kind == "linear_attention" else "self_attn"
        self.mlp = SparseMoeBlock(c)
        self.input_layernorm, self.post_attention_layernorm = nn.Module(), nn.Module()
        self.input_layernorm.weight = nn.Parameter(torch.zeros(h))
        self.post_attention_layernorm.weight = nn.Parameter(torch.zeros(h))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + getattr(self, self.mixer_name)(rms_norm(x, self.input_layernorm.weight, self.eps))
        y, balance, share = self.mlp(rms_norm(x, self.post_attention_layernorm.weight, self.eps))
        return x + y, balance, share


class Model(nn.Module):
    """`Qwen3_5MoeForCausalLM` with tied embeddings; `state_dict()` has its names."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(DecoderLayer(config, kind) for kind in config["layer_types"])
        self.model.norm = nn.Module()
        self.model.norm.weight = nn.Parameter(torch.zeros(config["hidden_size"]))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, T) → hidden states after the final norm, mean balance loss, shares (layers, experts)."""
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        balances, shares = [], []
        for layer in self.model.layers:
            x, balance, share = layer(x)
            balances.append(balance)
            shares.append(share)
        x = rms_norm(x, self.model.norm.weight, self.config["rms_norm_eps"])
        return x, torch.stack(balances).mean(), torch.stack(shares)

    def logits(self, tokens: Tensor) -> Tensor:
        return linear(self(tokens)[0], self.model.embed_tokens.weight).float()
