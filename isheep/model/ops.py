"""The operations of the decoder, and the one place that picks who computes them.

On a CPU in fp32 and bf16, where a compiler is at hand, C++ (`isheep_kernels.cpu_ops`); on a GPU in fp32, fp16 and bf16
Triton; elsewhere torch's definitions (`*_ref`). ISHEEP_KERNELS in the environment can choose otherwise
(`isheep_kernels.choice`). `backend` says which, for the run's log. Every operation has a gradient for what can be
trained, but for those on the cache.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from isheep.model.batch import PackedBatch
from isheep_kernels import attention_packed as _packed
from isheep_kernels import attention_paged as _paged
from isheep_kernels import cpu, cpu_ops
from isheep_kernels import linear_cross_entropy as _head
from isheep_kernels import lora_matmul as _lora
from isheep_kernels import rms_norm as _norm
from isheep_kernels import rope as _rope
from isheep_kernels import sampling as _sampling
from isheep_kernels import swiglu as _swiglu
from isheep_kernels.choice import asked_for
from isheep_kernels.linear_cross_entropy import IGNORE
from isheep_kernels.lora_matmul import Dropout, Projection, dropout_mask
from isheep_kernels.variant import TYPES

__all__ = ["IGNORE", "Dropout", "Projection"]


def backend(x: Tensor) -> str:
    """Who computes on tensors like x: "cpp", "triton" or "torch"."""
    if cpu.serves(x):
        return "cpp"
    plain = type(x) in (Tensor, Parameter)  # another kind of tensor, such as a fake one, need not have an address
    return "triton" if plain and x.is_cuda and x.dtype in TYPES and not asked_for("torch") else "torch"


def _by(x: Tensor, *, cpp: Callable, triton: Callable, torch: Callable) -> Callable:
    """The one of them that serves x."""
    return {"cpp": cpp, "triton": triton, "torch": torch}[backend(x)]


# ---- norm, activation, rope ----------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] -> [..., C]; the mean square over C in fp32."""
    return _by(x, cpp=cpu_ops.rms_norm, triton=_norm.rms_norm, torch=_norm.rms_norm_ref)(x, weight, eps)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., C] -> rms_norm(x + residual), x + residual."""
    if backend(x) == "triton":
        return _norm.rms_norm_add(x, residual, weight, eps)
    total = residual + x
    return rms_norm(total, weight, eps), total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, [T, I] -> [T, I]."""
    return _by(gate, cpp=cpu_ops.swiglu, triton=_swiglu.swiglu, torch=_swiglu.swiglu_ref)(gate, up)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, H, D] and k [T, G, D] turned by cos, sin [T, D/2] fp32; without gradients it may be in place."""
    if backend(q) == "triton" and not torch.is_grad_enabled():
        _rope.rope_(q, k, cos, sin)
        return q, k
    return _by(q, cpp=cpu_ops.rope, triton=_rope.rope, torch=_rope_ref)(q, k, cos, sin)


def _rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rope.rope_ref(q, cos, sin), _rope.rope_ref(k, cos, sin)


# ---- attention -----------------------------------------------------------------------------------------------------


def attention_packed(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """Causal within each sequence of the batch. q [T, H, D], k and v [T, G, D] -> [T, H, D].

    On a GPU the last bits of q's gradient change from run to run, unless torch is asked for deterministic algorithms.
    """
    match backend(q):
        case "cpp":
            return cpu_ops.attention_packed(q, k, v, batch.cu_seqlens, scale)
        case "triton":
            exact = torch.are_deterministic_algorithms_enabled()
            return _packed.attention_packed(q, k, v, batch.cu_seqlens, scale, exact)
    return _packed.attention_packed_ref(q, k, v, [0, *accumulate(batch.seqlens)], scale)


def kv_cache_shapes(
    x: Tensor, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
) -> list[tuple[int, ...]]:
    """Shapes of one layer's key and value cache for tensors like x."""
    if backend(x) == "cpp":
        return cpu_ops.kv_cache_shapes(x.dtype, num_blocks, block_size, num_kv_heads, head_dim)
    return [(num_blocks, block_size, num_kv_heads, head_dim)] * 2


def write_kv(k: Tensor, v: Tensor, batch: PackedBatch, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put k, v [T, G, D] into one layer's cache, in place."""
    assert batch.paged is not None
    write = cpu_ops.write_kv if backend(k) == "cpp" else _paged.write_kv_ref
    write(k, v, batch.paged.slot_mapping, k_cache, v_cache)


def write_kv_rope(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Turn q and k as `rope` does, put k and v into one layer's cache -> q turned."""
    if backend(q) == "triton":
        assert batch.paged is not None
        return _paged.write_kv_rope(q, k, v, cos, sin, batch.paged.slot_mapping, k_cache, v_cache)
    q, k = rope(q, k, cos, sin)
    write_kv(k, v, batch, k_cache, v_cache)
    return q


def attention_paged(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PackedBatch, scale: float) -> Tensor:
    """Causal attention of q [T, H, D] over the cached positions of each sequence -> [T, H, D]."""
    assert batch.paged is not None
    paged = batch.paged
    where = batch.cu_seqlens, paged.context_lens, paged.block_tables
    if backend(q) == "triton":
        longest = max(batch.seqlens), paged.max_context_len
        return _paged.attention_paged(q, k_cache, v_cache, *where, *longest, scale)
    attend = cpu_ops.attention_paged if backend(q) == "cpp" else _paged.attention_paged_ref
    return attend(q, k_cache, v_cache, *where, scale)


def decode_splits(k_cache: Tensor, rows: int, max_context_len: int) -> int:
    """Among how many programs Triton's `attention_paged` splits the keys, where each of `rows` sequences has one query.

    k_cache [..., G, D]. A CUDA graph has the number built in.
    """
    return _paged.choose_splits(rows * k_cache.shape[-2], max_context_len, _paged.resident_programs(k_cache))


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


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, packed: Tensor | None = None
) -> Tensor:
    """x wᵀ + bias + (x aᵀ) bᵀ without gradients; a [r, K] and b [N, r] in x.dtype, `packed` is prepack(weight)."""
    if backend(x) == "triton":
        return _lora.lora_matmul(x, weight, bias, a, b, 1.0)
    return linear(x, weight, bias, packed).addmm_(x @ a.t(), b.t())


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`lora_linear`, or where there are gradients `lora_linear_train`, of layers that share x, on a GPU."""
    return _lora.lora_matmuls(x, projections)


def lora_linear_train(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """x wᵀ + bias + scale · (drop(x) aᵀ) bᵀ with gradients for x, a and b.

    x [T, K], weight [N, K], a [r, K] fp32, b [N, r] fp32 -> [T, N]; the same dropout gives the same masks.
    """
    if backend(x) == "triton":
        return _lora.lora_matmul(x, weight, bias, a, b, scale, dropout)
    if dropout is not None:  # read through a pointer
        tokens = dropout.tokens
        assert tokens.shape == x.shape[:1] and tokens.dtype == torch.int64 and tokens.is_contiguous()
    delta, x = _LoRADelta.apply(x, bias, a, b, scale, dropout)
    return _AddFrozen.apply(delta, x, weight)


class _LoRADelta(torch.autograd.Function):
    """bias + scale · (drop(x) aᵀ) bᵀ, and x again, on its way to the frozen product. Keeps x and the [T, r] product.

    x passes through so that its two gradients are added where the first one lies.
    """

    @staticmethod
    def forward(ctx, x, bias, a, b, scale, dropout):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.dropout = scale if dropout is None else scale / (1 - dropout.p), dropout
        x = x.contiguous()
        low = _down(x, a, dropout)
        ctx.save_for_backward(x, a, b, low)
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        return _delta(low, b, bias, ctx.scale, x), passed

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        x, a, b, low = ctx.saved_tensors
        dy, dx = grads[0].contiguous(), grads[1]
        dlow = _down(dy, b.t().contiguous()).mul_(ctx.scale)
        da = _outer(dlow, x, ctx.dropout)
        db = _outer(low, dy).mul_(ctx.scale).t()
        if ctx.needs_input_grad[0]:
            _add(dx, dlow, a, ctx.dropout)
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


# What it is made of: in C++ in fp32, by the definition in x.dtype.


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """drop(x), survivors as they are."""
    return x if dropout is None else x * dropout_mask(x, *dropout)


def _down(x: Tensor, a: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) aᵀ: x [T, K], a [r, K] fp32 -> [T, r]. Survivors are not scaled up here."""
    if cpu.serves(x):
        return cpu_ops.lora_down(x, a, dropout)
    return F.linear(_dropped(x, dropout), a.to(x.dtype))


def _delta(low: Tensor, b: Tensor, bias: Tensor | None, scale: float, like: Tensor) -> Tensor:
    """bias + scale · low bᵀ: low [T, r], b [N, r] fp32 -> [T, N] in like.dtype."""
    if cpu.serves(like):
        return cpu_ops.lora_delta(low, b, bias, scale, like)
    delta = (low @ b.t().to(low.dtype)).mul_(scale)
    return delta if bias is None else delta.add_(bias)


def _add(y: Tensor, low: Tensor, a: Tensor, dropout: Dropout | None) -> None:
    """y [T, K] += drop(low a), in place: the way back of `_down`."""
    if cpu.serves(y):
        cpu_ops.lora_add(y, low, a, dropout)
    elif dropout is None:
        y.addmm_(low, a.to(y.dtype))
    else:
        y.add_(_dropped(low @ a.to(y.dtype), dropout))


def _outer(low: Tensor, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    """lowᵀ drop(x): low [T, r], x [T, K] -> [r, K] fp32."""
    if cpu.serves(x):
        return cpu_ops.lora_outer(low, x, dropout)
    return (low.t() @ _dropped(x, dropout)).float()


# ---- the head ------------------------------------------------------------------------------------------------------


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Negative log-likelihood [T] fp32 of targets [T] int64 under softmax(hidden weightᵀ), differentiable by hidden.

    hidden [T, C], weight [V, C] frozen; a target of IGNORE is not counted: loss 0, no gradient. `chunk` rows of logits
    exist at once, on a GPU as many as fit 256 MB. A target outside the vocabulary is an IndexError; on a GPU, of which
    nothing is asked, its loss is nan.
    """
    if backend(hidden) == "triton":
        return _head.fused_linear_cross_entropy(hidden, weight, targets)
    return _head.linear_cross_entropy(hidden, weight, targets, chunk)


# ---- sampling ------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a row of logits [B, V], and its log-probability; parameters [B] as in `sample_ref`."""
    draw = _by(logits, cpp=cpu_ops.sample, triton=_sampling.sample, torch=_sampling.sample_ref)
    return draw(logits, temperature, top_k, top_p, min_p, uniform)
