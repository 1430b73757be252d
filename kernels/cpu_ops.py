"""The C++ kernels as operations of torch, with gradients, on what `cpu.serves`. Shapes are those of the definitions."""

from typing import Any

import torch
from torch import Tensor

from isheep_kernels import cpu
from isheep_kernels.lora_matmul import Dropout


def _run(name: str, x: Tensor, *args: Tensor | float) -> None:
    """Call a kernel: tensors go in as pointers."""
    cpu.kernel(name, x.dtype)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in (x, *args)))


# ---- norm, activation, rope ------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, y = eps, torch.empty_like(x)
        _run("rms_norm", x, weight, y, x.numel() // x.shape[-1], x.shape[-1], eps)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        rows = x.numel() // x.shape[-1]
        _run("rms_norm_backward", grads[0].contiguous(), x, weight, dx, rows, x.shape[-1], ctx.eps)
        return dx, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _run("swiglu", gate, up, y, gate.numel())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _run("swiglu_backward", grads[0].contiguous(), gate, up, dgate, dup, gate.numel())
        return dgate, dup


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x)
        _run("rope", x, y, cos, sin, *x.shape, 1.0)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = grads[0].contiguous()
        dx = torch.empty_like(dx).copy_(dx)
        _run("rope", dx, dx, cos, sin, *dx.shape, -1.0)  # a rotation's gradient is the rotation back
        return dx, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _Rope.apply(q.contiguous(), cos, sin), _Rope.apply(k.contiguous(), cos, sin)


# ---- attention -----------------------------------------------------------------------------------------------------


class _AttentionPacked(torch.autograd.Function):
    """Backward computes the weights again: nothing but the inputs is kept."""

    @staticmethod
    def forward(ctx, q, k, v, cu, scale):  # type: ignore[no-untyped-def]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, cu)
        ctx.scale, y = scale, torch.empty_like(q)
        _run("attention_packed", q, k, v, y, cu, len(cu) - 1, q.shape[1], *k.shape[1:], scale)
        return y

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        q, k, v, cu = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = (len(cu) - 1, q.shape[1], *k.shape[1:], ctx.scale)
        _run("attention_packed_backward", q, k, v, grads[0].contiguous(), dq, dk, dv, cu, *sizes)
        return dq, dk, dv, None, None


def attention_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return _AttentionPacked.apply(q, k, v, cu_seqlens, scale)


def kv_cache_shapes(
    dtype: torch.dtype, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> list[tuple[int, ...]]:
    """Of a layer's keys, held transposed in packs of four bytes, and of its values."""
    assert block_size % 16 == 0, f"blocks of {block_size} slots: the kernel takes sixteen keys at once"
    pack = 4 // dtype.itemsize
    keys = (num_blocks, num_kv_heads, head_dim // pack, block_size, pack)
    return [keys, (num_blocks, num_kv_heads, block_size, head_dim)]


def write_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    tokens, heads, head_dim = k.shape
    _run("write_kv", k, v, slots, k_cache, v_cache, tokens, heads, head_dim, v_cache.shape[2])


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    y = torch.empty_like(q)
    heads, (groups, block_size, head_dim) = q.shape[1], v_cache.shape[1:]
    sizes = (block_tables.shape[1], len(block_tables), heads, groups, head_dim, block_size, scale)
    _run("attention_paged", q, k_cache, v_cache, y, cu_seqlens, context_lens, block_tables, *sizes)
    return y


# ---- low-rank adapters -----------------------------------------------------------------------------------------------


def _draws(dropout: Dropout | None) -> tuple[int, int, int]:
    """What the kernels take: key, threshold below which a 32-bit number means dropped (0: never), tokens."""
    return (0, 0, 0) if dropout is None else (dropout.key, round(dropout.p * 2**32), dropout.tokens.data_ptr())


def lora_down(x: Tensor, a: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) aᵀ: x [T, K], a [r, K] fp32 -> [T, r] fp32. Survivors are not scaled up here."""
    low = torch.empty(len(x), len(a), dtype=torch.float32)
    _run("lora_down", x, a, low, *x.shape, len(a), *_draws(dropout))
    return low


def lora_delta(low: Tensor, b: Tensor, bias: Tensor | None, scale: float, like: Tensor) -> Tensor:
    """bias + scale · low bᵀ: low [T, r], b [N, r] fp32 -> [T, N] in like.dtype."""
    y = like.new_empty(len(low), len(b))
    offset = 0 if bias is None else bias.data_ptr()
    _run("lora_up", y, low, b.t().contiguous(), offset, *y.shape, low.shape[1], scale, 0, *_draws(None))
    return y


def lora_add(y: Tensor, low: Tensor, a: Tensor, dropout: Dropout | None) -> None:
    """y [T, K] += drop(low a), in place: the way back of `lora_down`."""
    _run("lora_up", y, low, a, 0, *y.shape, len(a), 1.0, 1, *_draws(dropout))


def lora_outer(low: Tensor, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    """lowᵀ drop(x): low [T, r], x [T, K] -> [r, K] fp32."""
    out = torch.empty(low.shape[1], x.shape[1], dtype=torch.float32)
    _run("lora_outer", x, low, out, *x.shape, low.shape[1], *_draws(dropout))
    return out


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    _run("sample", logits.contiguous(), rows, vocab, temperature, top_k, top_p, min_p, uniform, tokens, logprobs)
    return tokens, logprobs
