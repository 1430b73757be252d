"""What the kernels are timed against: the same work by torch, its compiler, and PEFT.

Each rival takes the inputs of its case by name, as ours does. What it needs beside them, such as a mask or its own form
of a cache, is made at its first call, which is not timed. A rival that is not installed, or does not run on a machine,
says so by an exception, and `bench` leaves it out. PEFT is no dependency: nothing else here knows it.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from isheep_kernels.lora_matmul import Projection, lora_matmul_ref

Function = Callable[..., Any]
CHUNK = 1024  # rows of logits that the chunked cross-entropy holds
PAGE = 128  # tokens of a page of FlexAttention's, whose tiles of keys must lie within one


def compiled(function: Function) -> Function:
    """Wholly, or it says so: nothing runs eagerly under the compiler's name."""
    return torch.compile(function, dynamic=False, fullgraph=True)


# ---- attention -------------------------------------------------------------------------------------------------------


def dense_attention(seq_len: int) -> dict[str, Function]:
    """torch's own, of sequences that are all alike."""

    def library(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
        rows = (x.unflatten(0, (-1, seq_len)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).reshape(q.shape)

    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    return {name: partial(library, backend) for name, backend in backends.items()}


def packed_attention(lens: Sequence[int]) -> dict[str, Function]:
    """What torch has for sequences packed into one."""
    flex, mask = compiled(flex_attention), cache(partial(_document_mask, tuple(lens)))

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn  # not in every torch
        groups = {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}
        if not groups:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        ends = cu_seqlens, cu_seqlens, max(lens), max(lens)
        return attend(q, k, v, *ends, scale=scale, window_size=(-1, 0), **groups)

    def documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex(*heads, block_mask=mask(q.device), scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return {"varlen_attn": varlen, "FlexAttention": documents}


def _document_mask(lens: tuple[int, ...], device: torch.device) -> BlockMask:
    """A query sees the keys of its own sequence up to itself."""
    owner = torch.arange(len(lens), device=device).repeat_interleave(torch.tensor(lens, device=device))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (owner[query] == owner[key]) & (query >= key)

    return create_block_mask(sees, None, None, sum(lens), sum(lens), device)


def paged_attention(length: int) -> dict[str, Function]:
    """A decode step of sequences of one length, each with a query of one token."""
    flex, paged = compiled(flex_attention), cache(partial(_flex_pages, length))

    def gather(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, scale: float, **_: Any) -> Tensor:
        k, v = (_gathered(x, block_tables, length) for x in (k_cache, v_cache))
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)[:, :, 0]

    def pages(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, scale: float, **_: Any) -> Tensor:
        k, v, mask = paged(k_cache, v_cache, block_tables)
        return flex(q[:, :, None], k, v, block_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]

    return {"gather and SDPA": gather, "FlexAttention": pages}


def _gathered(blocks: Tensor, block_tables: Tensor, length: int) -> Tensor:
    """The cache [NB, BS, G, D] of each sequence, as one [S, G, length, D]."""
    return blocks[block_tables].flatten(1, 2)[:, :length].transpose(1, 2)


def _flex_pages(
    length: int, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor
) -> tuple[Tensor, Tensor, BlockMask]:
    """The same keys and values in pages of FlexAttention's, [1, G, slots, D], and the mask that finds them there."""
    paging = importlib.import_module("torch.nn.attention.experimental._paged_attention")
    S, device, per_sequence = len(block_tables), k_cache.device, -(-length // PAGE)
    pages = paging.PagedAttention(S * per_sequence, PAGE, S, device)
    sequences, positions = torch.arange(S, device=device), torch.arange(length, device=device)
    for sequence in sequences:
        pages.reserve(sequence, torch.tensor(length, device=device))
    caches = [x.new_zeros(1, x.shape[2], S * per_sequence * PAGE, x.shape[3]) for x in (k_cache, v_cache)]
    held = (_gathered(x, block_tables, length) for x in (k_cache, v_cache))
    pages.assign(sequences, positions.expand(S, -1), *held, *caches)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < length

    mask = create_block_mask(sees, S, None, 1, per_sequence * PAGE, device, BLOCK_SIZE=(PAGE, PAGE))
    return *caches, pages.convert_logical_block_mask(mask)


# ---- linear layers ---------------------------------------------------------------------------------------------------


class _Products(torch.autograd.Function):
    """x wᵀ of each w; backward, dy w of each, which are not added up: the products alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        return tuple(x @ w.t() for w in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        dx, *_ = [dy @ w for dy, w in zip(dys, ctx.saved_tensors, strict=True)]
        return dx, *[None] * len(dys)


def base_product(x: Tensor, w: Tensor, **_: Any) -> Tensor:
    """A frozen layer without its adapter: the least that it can take."""
    return _Products.apply(x, w)[0]


def base_products(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`base_product` of several."""
    return _Products.apply(x, *(p.w for p in projections))


def _with_adapter(layer: torch.nn.Module, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A layer of PEFT's on these tensors, in x.dtype, which is faster than its own choice of fp32 adapters."""
    tensors = {"base_layer": w, "lora_A.default": a.to(x.dtype), "lora_B.default": b.to(x.dtype)}
    return torch.func.functional_call(layer, {f"{name}.weight": t for name, t in tensors.items()}, (x,))


def peft_linear(
    x: Tensor, w: Tensor, bias: None, a: Tensor, b: Tensor, scale: float, call: Function = _with_adapter
) -> Tensor:
    return call(_peft_layer(*w.shape, len(a), scale), x, w, a, b)


def lora_linears() -> dict[str, Function]:
    """Each takes what `lora_matmul` takes, without dropout or bias."""
    own = {"eager": lora_matmul_ref, "torch.compile": compiled(lora_matmul_ref)}
    return own | {"PEFT": peft_linear, "PEFT, torch.compile": partial(peft_linear, call=compiled(_with_adapter))}


@cache
def _peft_layer(N: int, K: int, rank: int, scale: float) -> torch.nn.Module:
    """Without weights of its own."""
    peft = importlib.import_module("peft")
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, device="meta"))
    config = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["0"])
    return peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)[0]


# ---- the head --------------------------------------------------------------------------------------------------------


def in_chunks(function: Function, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """What `function` makes of CHUNK rows at a time, its tensors put together: only a chunk has logits."""
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    made = [function(hidden=h, weight=weight, targets=t) for h, t in pieces]
    return tuple(map(torch.cat, zip(*made, strict=True)))
