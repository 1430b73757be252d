"""The decoder's parts, on packed tokens. T tokens, C hidden size, H query heads, G key/value heads, D head size.

Parameter names are the checkpoint's own. Base parameters are frozen; what trains are the adapters inside `Linear`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isheep.model import ops
from isheep.model.batch import AdapterSegment, PackedBatch
from isheep.model.config import ModelConfig

CosSin = tuple[Tensor, Tensor]  # [T, D/2] each, fp32
LayerKV = tuple[Tensor, Tensor]  # one layer's key and value cache, shaped by ops.kv_cache_shapes


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(nn.Module):
    """A frozen linear layer with room for adapters, by name. `packed` is a faster copy held while sampling on a CPU."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = frozen(out_features, in_features)
        self.bias = frozen(out_features) if bias else None
        self.lora = nn.ModuleDict()
        self.packed: Tensor | None = None

    def forward(self, x: Tensor, adapters: tuple[AdapterSegment, ...] = ()) -> Tensor:
        """x [T, in] -> [T, out]; each segment of tokens through its own adapter."""
        segments = [(self.lora[name], start, end) for name, start, end in adapters if name in self.lora]
        if torch.is_grad_enabled() and segments:
            ((pair, start, end),) = segments  # training sees all its tokens through the one adapter it trains
            assert (start, end) == (0, len(x))
            return pair.train_linear(x, self.weight, self.bias)  # type: ignore[operator]
        if len(segments) == 1 and segments[0][1:] == (0, len(x)):
            a, b = segments[0][0].cast(x.dtype)  # type: ignore[operator]
            return ops.lora_linear(x, self.weight, self.bias, a, b, self.packed)
        y = ops.linear(x, self.weight, self.bias, self.packed)
        for pair, start, end in segments:
            a, b = pair.cast(x.dtype)  # type: ignore[operator]
            y[start:end].addmm_(x[start:end] @ a.t(), b.t())
        return y


def project(x: Tensor, linears: Sequence[Linear], adapters: tuple[AdapterSegment, ...]) -> tuple[Tensor, ...]:
    """Linear layers that take the same x [T, in] -> [T, out] of each.

    On a GPU, where all tokens are seen through one adapter, the layers' products of x with its A are one launch.
    """
    name, *span = adapters[0] if len(adapters) == 1 else ("", 0, 0)
    if span == [0, len(x)] and ops.backend(x) == "triton" and all(name in linear.lora for linear in linears):
        pairs: list[Any] = [linear.lora[name] for linear in linears]
        if not any(pair.num_frozen and torch.is_grad_enabled() for pair in pairs):
            return ops.lora_linears(x, [p.projection(w.weight, w.bias, x.dtype) for p, w in zip(pairs, linears)])
    return tuple(linear(x, adapters) for linear in linears)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = frozen(size), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """-> norm(x + residual), x + residual."""
        return ops.rms_norm_add(x, residual, self.weight, self.eps)


class Rotary(nn.Module):
    """Angles of the rotary embedding, with Llama-3.1's and linear scaling."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.base, self.head_dim, self.scaling = config.rope_theta, config.head_dim, config.rope_scaling or {}
        self._on: dict[torch.device, Tensor] = {}  # the frequencies, copied to a device once: a copy waits for it

    def frequencies(self) -> Tensor:
        """[D/2] fp32, radians a position. Llama-3.1 slows the slow ones by `factor` and blends in between."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device="cpu").float() / self.head_dim
        freq = 1.0 / (self.base**exponents)
        if self.scaling.get("rope_type") == "linear":
            return freq / self.scaling["factor"]
        if self.scaling.get("rope_type") == "llama3":
            low, high, factor = (self.scaling[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
            turns = self.scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: turns often in the old context, left as it is
            return keep * freq + (1 - keep) * freq / factor
        return freq

    def forward(self, positions: Tensor) -> CosSin:
        if positions.device not in self._on:
            with torch.inference_mode(False):
                self._on[positions.device] = self.frequencies().to(positions.device)
        angles = positions[:, None].float() * self._on[positions.device]
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Grouped-query causal attention; Qwen2 has a bias on q, k and v, Qwen3 a norm on each query and key head.

    Head counts are read off the projections, so tensor parallelism shards the weights and edits nothing here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = Linear(C, H * D, config.qkv_bias)
        self.k_proj = Linear(C, G * D, config.qkv_bias)
        self.v_proj = Linear(C, G * D, config.qkv_bias)
        self.o_proj = Linear(H * D, C, config.out_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cos_sin: CosSin, batch: PackedBatch, kv: LayerKV | None) -> Tensor:
        """x [T, C] -> [T, C]. `kv` is this layer's cache when sampling, None in training and scoring."""
        projected = project(x, (self.q_proj, self.k_proj, self.v_proj), batch.adapters)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = self.head_dim**-0.5
        if kv is None:
            q, k = ops.rope(q, k, *cos_sin)
            y = ops.attention_packed(q, k, v, batch, scale)
        else:
            q = ops.write_kv_rope(q, k, v, *cos_sin, batch, *kv)
            y = ops.attention_paged(q, *kv, batch, scale)
        return self.o_proj(y.flatten(1), batch.adapters)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, inner, config.mlp_bias)
        self.up_proj = Linear(C, inner, config.mlp_bias)
        self.down_proj = Linear(inner, C, config.mlp_bias)

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj), batch.adapters)
        return self.down_proj(ops.swiglu(gate, up), batch.adapters)


class Layer(nn.Module):
    """One block: x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos_sin: CosSin, batch: PackedBatch, kv: LayerKV | None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos_sin, batch, kv)
        y, x = self.post_attention_layernorm.after_adding(y, x)
        return x + self.mlp(y, batch)
