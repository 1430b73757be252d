"""The operations of the decoder, and the one place that picks who computes them.

On the CPU in fp32 and bf16: the C++ kernels of `isheep_kernels.cpu`, where a compiler is at hand. Elsewhere: torch's
definitions (`*_ref`). `backend` says which, for the run's log. Every operation has a gradient for what can be trained.
"""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep.model.batch import PackedBatch
from isheep_kernels import cpu
from isheep_kernels.attention_packed import attention_packed_ref
from isheep_kernels.attention_paged import attention_paged_ref, write_kv_ref
from isheep_kernels.linear_cross_entropy import IGNORE, linear_cross_entropy
from isheep_kernels.lora_matmul import Dropout, dropout_mask
from isheep_kernels.rms_norm import rms_norm_ref
from isheep_kernels.rope import rope_ref
from isheep_kernels.sampling import sample_ref
from isheep_kernels.swiglu import swiglu_ref

__all__ = ["IGNORE", "Dropout", "linear_cross_entropy"]


def backend(x: Tensor) -> str:
    """Who computes on tensors like x: "cpp" or "torch"."""
    return "cpp" if cpu.serves(x) else "torch"


def _run(name: str, x: Tensor, *args: Tensor | float) -> None:
    """Call a C++ kernel: tensors go in as pointers."""
    cpu.kernel(name, x.dtype)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in (x, *args)))


# ---- norm, rope, activation: forward and backward in C++ -----------------------------------------------------------


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
    """x [..., C] -> [..., C]; the mean square over C in fp32."""
    return _RMSNorm.apply(x, weight, eps) if cpu.serves(x) else rms_norm_ref(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [T, I] -> [T, I]."""
    return _SwiGLU.apply(gate, up) if cpu.serves(gate) else swiglu_ref(gate, up)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by cos, sin [T, D/2] fp32 -> [T, H, D]."""
    return _Rope.apply(x.contiguous(), cos, sin) if cpu.serves(x) else rope_ref(x, cos, sin)


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


def attention_packed(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """Causal within each sequence of the batch. q [T, H, D], k and v [T, G, D] -> [T, H, D]."""
    if cpu.serves(q):
        return _AttentionPacked.apply(q, k, v, batch.cu_seqlens, scale)
    return attention_packed_ref(q, k, v, [0, *accumulate(batch.seqlens)], scale)


def kv_cache_shapes(
    x: Tensor, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> list[tuple[int, ...]]:
    """Shapes of one layer's key and value cache for tensors like x; the C++ kernel keeps keys transposed."""
    if cpu.serves(x):
        assert block_size % 16 == 0, f"blocks of {block_size} slots: the kernel takes sixteen keys at once"
        pack = 4 // x.element_size()
        keys = (num_blocks, num_kv_heads, head_dim // pack, block_size, pack)
        return [keys, (num_blocks, num_kv_heads, block_size, head_dim)]
    return [(num_blocks, block_size, num_kv_heads, head_dim)] * 2


def write_kv(k: Tensor, v: Tensor, batch: PackedBatch, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put k, v [T, G, D] into one layer's cache, in place."""
    assert batch.paged is not None
    slots = batch.paged.slot_mapping
    if cpu.serves(k):
        tokens, heads, head_dim = k.shape
        _run("write_kv", k, v, slots, k_cache, v_cache, tokens, heads, head_dim, v_cache.shape[2])
    else:
        write_kv_ref(k, v, slots, k_cache, v_cache)


def attention_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """Causal attention of q [T, H, D] over the cached positions of each sequence -> [T, H, D]."""
    assert batch.paged is not None
    paged, cu = batch.paged, batch.cu_seqlens
    if not cpu.serves(q):
        return attention_paged_ref(q, k_cache, v_cache, cu, paged.context_lens, paged.block_tables, scale)
    y = torch.empty_like(q)
    heads, (groups, block_size, head_dim) = q.shape[1], v_cache.shape[1:]
    tables = paged.block_tables
    sizes = (tables.shape[1], len(tables), heads, groups, head_dim, block_size, scale)
    _run("attention_paged", q, k_cache, v_cache, y, cu, paged.context_lens, tables, *sizes)
    return y


# ---- linear layers with adapters -----------------------------------------------------------------------------------


def prepack(weight: Tensor, rows: int) -> Tensor | None:
    """A bf16 CPU weight in oneDNN's blocked order, best for about `rows` rows; None where that buys nothing.

    F.linear reorders the weight in every call, a third of its time at decode sizes. A packed copy belongs to sampling,
    like the key/value cache, and is dropped with it.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x [T, K] -> [T, N]; `packed` is prepack(weight)."""
    if packed is not None and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """drop(x), survivors as they are."""
    return x if dropout is None else x * dropout_mask(x, *dropout)


def _draws(dropout: Dropout | None) -> tuple[int, int, int]:
    """What the C++ kernels take: key, threshold below which a 32-bit number means dropped (0: never), tokens."""
    return (0, 0, 0) if dropout is None else (dropout.key, round(dropout.p * 2**32), dropout.tokens.data_ptr())


def _lora_down(x: Tensor, a: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) aᵀ: x [T, K], a [r, K] fp32 -> [T, r], fp32 from C++, else x.dtype. Survivors are not scaled up here."""
    if not cpu.serves(x):
        return F.linear(_dropped(x, dropout), a.to(x.dtype))
    low = torch.empty(len(x), len(a), dtype=torch.float32)
    _run("lora_down", x, a, low, *x.shape, len(a), *_draws(dropout))
    return low


def _lora_delta(low: Tensor, b: Tensor, bias: Tensor | None, scale: float, like: Tensor) -> Tensor:
    """bias + scale · low bᵀ: low [T, r], b [N, r] fp32 -> [T, N] in like.dtype."""
    if not cpu.serves(like):
        delta = (low @ b.t().to(low.dtype)).mul_(scale)
        return delta if bias is None else delta.add_(bias)
    y = like.new_empty(len(low), len(b))
    offset = 0 if bias is None else bias.data_ptr()
    _run("lora_up", y, low, b.t().contiguous(), offset, *y.shape, low.shape[1], scale, 0, *_draws(None))
    return y


def _lora_add(y: Tensor, low: Tensor, a: Tensor, dropout: Dropout | None) -> None:
    """y [T, K] += drop(low a), in place: the way back of `_lora_down`."""
    if cpu.serves(y):
        _run("lora_up", y, low, a, 0, *y.shape, len(a), 1.0, 1, *_draws(dropout))
    elif dropout is None:
        y.addmm_(low, a.to(y.dtype))
    else:
        y.add_(_dropped(low @ a.to(y.dtype), dropout))


def _lora_outer(low: Tensor, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    """lowᵀ drop(x): low [T, r], x [T, K] -> [r, K] fp32."""
    if not cpu.serves(x):
        return (low.t() @ _dropped(x, dropout)).float()
    out = torch.empty(low.shape[1], x.shape[1], dtype=torch.float32)
    _run("lora_outer", x, low, out, *x.shape, low.shape[1], *_draws(dropout))
    return out


class _LoRADelta(torch.autograd.Function):
    """bias + scale · (drop(x) aᵀ) bᵀ, and x again, on its way to the frozen product. Keeps x and the [T, r] product.

    x passes through so that its two gradients are added where the first one lies.
    """

    @staticmethod
    def forward(ctx, x, bias, a, b, scale, dropout):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.dropout = scale if dropout is None else scale / (1 - dropout.p), dropout
        x = x.contiguous()
        low = _lora_down(x, a, dropout)
        ctx.save_for_backward(x, a, b, low)
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        return _lora_delta(low, b, bias, ctx.scale, x), passed

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, a, b, low = ctx.saved_tensors
        dy, dx = grads[0].contiguous(), grads[1]
        dlow = _lora_down(dy, b.t().contiguous()).mul_(ctx.scale)
        da = _lora_outer(dlow, x, ctx.dropout)
        db = _lora_outer(low, dy).mul_(ctx.scale).t()
        if ctx.needs_input_grad[0]:
            _lora_add(dx, dlow, a, ctx.dropout)
        return dx if ctx.needs_input_grad[0] else None, None, da, db, None, None


class _AddFrozen(torch.autograd.Function):
    """delta + x wᵀ in place of delta. It keeps nothing that a checkpoint would have to compute again, so where this is
    a layer's last product, computing the layer again ends before it."""

    @staticmethod
    def forward(ctx, delta, x, weight):  # type: ignore[no-untyped-def]
        ctx.weight = weight  # frozen and alive anyway; save_for_backward would hand it to the checkpoint
        ctx.mark_dirty(delta)
        return delta.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return grads[0], grads[0] @ ctx.weight if ctx.needs_input_grad[1] else None, None


def lora_linear_train(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """x wᵀ + bias + scale · (drop(x) aᵀ) bᵀ with gradients for x, a and b.

    x [T, K], weight [N, K], a [r, K] fp32, b [N, r] fp32 -> [T, N]; the same dropout gives the same masks.
    """
    if dropout is not None:  # read through a pointer
        tokens = dropout.tokens
        assert tokens.shape == x.shape[:1] and tokens.dtype == torch.int64 and tokens.is_contiguous()
    delta, x = _LoRADelta.apply(x, bias, a, b, scale, dropout)
    return _AddFrozen.apply(delta, x, weight)


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a row of logits [B, V], and its log-probability; parameters [B] as in `sample_ref`."""
    if not cpu.serves(logits):
        return sample_ref(logits, temperature, top_k, top_p, min_p, uniform)
    rows, vocab = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    _run("sample", logits.contiguous(), rows, vocab, temperature, top_k, top_p, min_p, uniform, tokens, logprobs)
    return tokens, logprobs
