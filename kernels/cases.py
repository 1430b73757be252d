"""What `bench` times: every op in the shapes of the models, its least cost, its rivals, and what is asked of it.

Counts are of floating-point operations and of bytes that cannot be done without; bf16 is two bytes. Each op's function
takes a model's name and shape and yields its cases.
"""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isheep_kernels.attention_packed import attention_packed, attention_packed_ref
from isheep_kernels.attention_paged import attention_paged, attention_paged_ref
from isheep_kernels.linear_cross_entropy import fused_linear_cross_entropy, linear_cross_entropy_ref
from isheep_kernels.lora_matmul import FUSED_UP_TO, Projection, lora_matmul, lora_matmul_ref, lora_matmuls
from isheep_kernels.rivals import (
    Function,
    base_product,
    base_products,
    compiled,
    dense_attention,
    in_chunks,
    lora_linears,
    packed_attention,
    paged_attention,
)
from isheep_kernels.rms_norm import rms_norm, rms_norm_add, rms_norm_ref
from isheep_kernels.rope import rope, rope_ref
from isheep_kernels.sampling import sample, sample_ref
from isheep_kernels.swiglu import swiglu, swiglu_ref


class Model(NamedTuple):
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


MODELS = {
    "qwen1.5-7b": Model(4096, 11008, 32, 32, 128, 151936),
    "qwen1.5-32b": Model(5120, 27392, 40, 8, 128, 152064),
    "qwen1.5-72b": Model(8192, 24576, 64, 64, 128, 152064),
    "llama-3-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": Model(8192, 28672, 64, 8, 128, 128256),
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 49152),
}
TRAIN, DECODE, RANK = 8192, 64, 16  # tokens of a training step and of a decode step; rank of an adapter
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)  # of sequences that are alike
MIX = tuple(random.Random(0).choices(range(100, 2001), k=16))  # lengths of rows of instruction tuning, packed
BATCHES, CONTEXTS = (32, 128, 512), (512, 2048, 8192)  # sequences in the cache, and how long each is
CACHE_BYTES = 20e9  # the largest cache: it is held three times over where it is checked in fp32
DEVICE, DTYPE = "cuda", torch.bfloat16


class Goal(NamedTuple):
    """What is asked of some rows: of a column, a rival's time over ours or ours of the limit, a least median."""

    column: str
    at_least: float


GOALS = {
    "attention forward, 128 wide, 2k to 16k": Goal("cuDNN / ours", 0.90),
    "attention forward, 64 wide or up to 1k": Goal("cuDNN / ours", 1.0),
    "attention backward": Goal("cuDNN / ours", 0.85),
    "attention of a packed mix, both passes": Goal("varlen_attn / ours", 1.5),
    "paged decoding, of stream": Goal("of the limit", 0.90),
    "LoRA layer of qwen1.5-72b, forward": Goal("base products alone / ours", 1 / 1.03),
    "LoRA layer of qwen1.5-72b, backward": Goal("base products alone / ours", 1 / 1.06),
    "LoRA layer of qwen1.5-7b, forward": Goal("base products alone / ours", 1 / 1.05),
    "LoRA layer of qwen1.5-7b, backward": Goal("base products alone / ours", 1 / 1.10),
    "linear cross-entropy": Goal("products alone / ours", 0.80),
    "norm, rope and swiglu, of stream": Goal("of the limit", 0.95),
    "drawing by top-p": Goal("sort alone / ours", 5.0),
}

Inputs = dict[str, Any]


class Case(NamedTuple):
    """One op on one shape. Functions take `inputs()`, made on the GPU; `reference` is what ours is compared with.

    Of "backward" and "both" the gradients of the inputs `trained` are made, from the "dys" among the inputs. `goal` is
    one of GOALS, or "".
    """

    op: str
    shape: str
    flops: float
    bytes: float
    inputs: Callable[[], Inputs]
    ours: Function
    reference: Function
    rivals: dict[str, Function]
    goal: str = ""
    passes: Literal["forward", "backward", "both"] = "forward"
    trained: tuple[str, ...] = ()


def outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def backward(case: Case, trained: tuple[str, ...], flops: float, num_bytes: float) -> Case:
    """The backward pass of a forward case alone, and its counts."""

    def inputs() -> Inputs:
        given = case.inputs()
        dys = [torch.randn_like(y) for y in outputs(case.ours(**given))]
        return given | {name: given[name].requires_grad_() for name in trained} | {"dys": dys}

    made = case._replace(shape=f"{case.shape}, backward", flops=flops, bytes=num_bytes, inputs=inputs)
    return made._replace(passes="backward", trained=trained)


def both_passes(case: Case, trained: tuple[str, ...], flops: float, num_bytes: float) -> Case:
    """A forward case and its backward pass, of which the counts are given."""
    sums = {"flops": case.flops + flops, "bytes": case.bytes + num_bytes}
    made = backward(case, trained, flops, num_bytes)
    return made._replace(shape=f"{case.shape}, both passes", passes="both", **sums)


# ---- norm, rope, swiglu ----------------------------------------------------------------------------------------------


def rms_norm_cases(name: str, m: Model) -> Iterator[Case]:
    size = TRAIN * m.hidden

    def inputs(*names: str) -> Inputs:
        return {n: randn(TRAIN, m.hidden) for n in names} | {"weight": randn(m.hidden), "eps": 1e-6}

    def added(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm_ref(x + residual, weight, eps), x + residual

    shape = f"{name} {TRAIN}×{m.hidden}"
    alone = streamed("rms_norm", shape, 4 * size, 4 * size, partial(inputs, "x"), rms_norm, rms_norm_ref)
    yield from (alone, both_passes(alone, ("x",), 9 * size, 6 * size))
    two = partial(inputs, "x", "residual")
    summed = streamed("rms_norm", f"{shape} + residual", 5 * size, 8 * size, two, rms_norm_add, added)
    yield from (summed, both_passes(summed, ("x", "residual"), 10 * size, 8 * size))


def rope_cases(name: str, m: Model) -> Iterator[Case]:
    size, D = TRAIN * (m.heads + m.kv_heads) * m.head_dim, m.head_dim

    def inputs() -> Inputs:
        angle = torch.rand(TRAIN, D // 2, device=DEVICE) * 6
        return {"q": randn(TRAIN, m.heads, D), "k": randn(TRAIN, m.kv_heads, D), "cos": angle.cos(), "sin": angle.sin()}

    def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope_ref(q, cos, sin), rope_ref(k, cos, sin)

    shape = f"{name} {TRAIN}×({m.heads}+{m.kv_heads})×{D}"
    forward = streamed("rope", shape, 3 * size, 4 * size + 4 * TRAIN * D, inputs, rope, reference)
    yield from (forward, both_passes(forward, ("q", "k"), forward.flops, forward.bytes))


def swiglu_cases(name: str, m: Model) -> Iterator[Case]:
    size = TRAIN * m.inner

    def inputs() -> Inputs:
        return {"gate": randn(TRAIN, m.inner), "up": randn(TRAIN, m.inner)}

    forward = streamed("swiglu", f"{name} {TRAIN}×{m.inner}", 5 * size, 6 * size, inputs, swiglu, swiglu_ref)
    yield from (forward, both_passes(forward, ("gate", "up"), 10 * size, 10 * size))


def streamed(
    op: str, shape: str, flops: float, num_bytes: float, inputs: Callable[[], Inputs], ours: Function, ref: Function
) -> Case:
    """A forward case of an op that only passes over its inputs."""
    rivals, goal = {"eager": ref, "torch.compile": compiled(ref)}, "norm, rope and swiglu, of stream"
    return Case(op, shape, flops, num_bytes, inputs, ours, ref, rivals, goal)


# ---- linear layers ---------------------------------------------------------------------------------------------------

SCALE = 2.0
READERS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # a layer's linears, those of the same x together


def lora_matmul_cases(name: str, m: Model) -> Iterator[Case]:
    """All linears of a layer at once, then some of them alone."""
    heads, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    sizes = {"q": (m.hidden, heads), "k": (m.hidden, kv), "v": (m.hidden, kv), "o": (heads, m.hidden)}
    sizes |= {"gate": (m.hidden, m.inner), "up": (m.hidden, m.inner), "down": (m.inner, m.hidden)}
    yield from lora_layer_cases(name, sizes)
    for T, layer in product((TRAIN, DECODE), ("q", "k", "gate", "down")):
        yield from lora_linear_cases(f"{name} {layer}", T, *sizes[layer])


def lora_layer_cases(name: str, sizes: dict[str, tuple[int, int]]) -> Iterator[Case]:
    """Beside its floor, the base products alone."""

    def inputs() -> Inputs:
        linears = {f"{n}_{layer}": x for layer, KN in sizes.items() for n, x in frozen_and_adapter(*KN).items()}
        return {f"x_{layer}": randn(TRAIN, sizes[layer][0]) for layer, *_ in READERS} | linears

    def layer(group: Callable[..., Any], **given: Any) -> list[Tensor]:
        made: list[Tensor] = []
        for names in READERS:
            tensors = ([given[f"{kind}_{n}"] for kind in "wab"] for n in names)
            made += group(given[f"x_{names[0]}"], [Projection(w, None, a, b, SCALE) for w, a, b in tensors])
        return made

    def one_by_one(linear: Function, x: Tensor, projections: list[Projection]) -> list[Tensor]:
        return [linear(x, p.w, None, p.a, p.b, p.scale) for p in projections]

    linears = {rival: partial(layer, partial(one_by_one, linear)) for rival, linear in lora_linears().items()}
    rivals = {"base products alone": partial(layer, base_products)} | linears
    counts = [lora_counts(TRAIN, *KN) for KN in sizes.values()]
    again = TRAIN * sum(sizes[n][0] for first, *others in READERS for n in others)  # x that others have read
    flops, num_bytes, flops_back, bytes_back = map(sum, zip(*counts))
    ours, reference = partial(layer, lora_matmuls), partial(layer, partial(one_by_one, lora_matmul_ref))
    shape = f"{name} all linears {TRAIN} r{RANK}"
    forward = Case("lora_matmul", shape, flops, num_bytes - 2 * again, inputs, ours, reference, rivals)
    trained = *(f"x_{first}" for first, *_ in READERS), *(f"{kind}_{n}" for n in sizes for kind in "ab")
    for case in (forward, backward(forward, trained, flops_back, bytes_back - 4 * again)):
        goal = f"LoRA layer of {name}, {case.passes}"
        yield case._replace(goal=goal if goal in GOALS else "")


def lora_linear_cases(name: str, T: int, K: int, N: int) -> Iterator[Case]:
    """Beside its floor and, forward, both forms that `FUSED_UP_TO` chooses from."""

    def inputs() -> Inputs:
        return {"x": randn(T, K), "bias": None, "scale": SCALE} | frozen_and_adapter(K, N)

    def form(widest: int, **inputs: Any) -> Tensor:
        with patch.dict(FUSED_UP_TO, dict.fromkeys(FUSED_UP_TO, widest)), patch.dict(os.environ, ISHEEP_KERNELS=""):
            return lora_matmul(**inputs)

    forms = {"one kernel": partial(form, 1 << 30), "library product and a pass": partial(form, 0)}
    rivals = {"base product alone": base_product} | lora_linears()
    flops, num_bytes, flops_back, bytes_back = lora_counts(T, K, N)
    functions = inputs, lora_matmul, lora_matmul_ref
    forward = Case("lora_matmul", f"{name} {T}×{K}→{N} r{RANK}", flops, num_bytes, *functions, rivals | forms)
    yield forward
    if T == TRAIN:
        yield backward(forward._replace(rivals=rivals), ("x", "a", "b"), flops_back, bytes_back)


def frozen_and_adapter(K: int, N: int) -> Inputs:
    a, b = torch.randn(RANK, K, device=DEVICE) / K**0.5, torch.randn(N, RANK, device=DEVICE)
    return {"w": randn(N, K) / K**0.5, "a": a, "b": b}


def lora_counts(T: int, K: int, N: int) -> tuple[float, float, float, float]:
    """Operations and bytes, forward; and backward: dx is the base product again, and four of the adapter's."""
    forward, adapter = 2 * T * (N * K + RANK * (N + K)), RANK * (N + K)
    moved, moved_back = 2 * (T * K + N * K + T * N) + 4 * adapter, 2 * (T * N + 2 * T * K + N * K) + 8 * adapter
    return forward, moved, forward + 2 * T * adapter, moved_back


def linear_cross_entropy_cases(name: str, m: Model) -> Iterator[Case]:
    """Loss alone, and loss with the gradient of hidden."""
    T, C, V = TRAIN, m.hidden, m.vocabulary
    product, num_bytes = 2 * T * C * V, 2 * (T * C + V * C) + 12 * T

    def inputs(gradient: bool) -> Inputs:
        hidden, weight = randn(T, C).requires_grad_(gradient), randn(V, C) / C**0.5
        return {"hidden": hidden, "weight": weight, "targets": torch.randint(V, (T,), device=DEVICE)}

    def loss(function: Function, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        nll = function(hidden, weight, targets)
        return (nll, *torch.autograd.grad(nll.sum(), hidden)) if hidden.requires_grad else (nll,)

    def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            logits = hidden @ weight.t()
            return logits @ weight if hidden.requires_grad else logits

    ours, eager = partial(loss, fused_linear_cross_entropy), partial(loss, linear_cross_entropy_ref)
    whole = {"eager": eager, "torch.compile": partial(loss, compiled(linear_cross_entropy_ref))}
    chunked = {f"{rival}, in chunks": partial(in_chunks, function) for rival, function in whole.items()}
    rivals = {"products alone": products} | whole | chunked
    for gradient in (False, True):
        work = product * (1 + gradient), num_bytes + 2 * T * C * gradient
        shape, make = f"{name} {T}×{C}→{V}{' with gradient' if gradient else ''}", partial(inputs, gradient)
        yield Case("linear_cross_entropy", shape, *work, make, ours, eager, rivals, "linear cross-entropy")


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_packed_cases(name: str, m: Model) -> Iterator[Case]:
    """Causal sequences that are alike, as the library's kernels take them too, and a packed mix of lengths."""
    H, G, D = m.heads, m.kv_heads, m.head_dim

    def inputs(*lens: int) -> Inputs:
        cu = torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=DEVICE)
        heads = {"q": H, "k": G, "v": G}
        return {n: randn(sum(lens), h, D) for n, h in heads.items()} | {"cu_seqlens": cu, "scale": D**-0.5}

    def passes(shape: str, lens: tuple[int, ...], rivals: dict[str, Function], then: Function) -> tuple[Case, Case]:
        flops, num_bytes = sum(2 * H * D * S * (S + 1) for S in lens), 4 * sum(lens) * (H + G) * D
        functions = partial(inputs, *lens), attention_packed, by_key_value_head, rivals
        case = Case("attention_packed", f"{name} {shape}×({H}/{G})×{D}", flops, num_bytes, *functions)
        return case, then(case, ("q", "k", "v"), 2.5 * flops, 2 * num_bytes)

    for S in LENGTHS:
        count = max(1, TRAIN // S)
        forward, back = passes(f"{count}×{S}", (S,) * count, dense_attention(S), backward)
        near = D == 64 or S <= 1024
        yield forward._replace(goal=f"attention forward, {'64 wide or up to 1k' if near else '128 wide, 2k to 16k'}")
        yield back._replace(goal="attention backward")
    forward, both = passes(f"mix of {len(MIX)}, {sum(MIX)}", MIX, packed_attention(MIX), both_passes)
    yield from (forward, both._replace(goal="attention of a packed mix, both passes"))


def by_key_value_head(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`attention_packed_ref`, some heads at a time: all scores of long sequences would fill a GPU."""
    attend = partial(attention_packed_ref, cu_seqlens=cu_seqlens.tolist(), scale=scale)
    heads = zip(q.split(q.shape[1] // k.shape[1], 1), k.split(1, 1), v.split(1, 1))
    return torch.cat([checkpoint(attend, *each, use_reentrant=False) for each in heads], 1)


def attention_paged_cases(name: str, m: Model) -> Iterator[Case]:
    """A decode step of some sequences in a cache of blocks of 16."""
    H, G, D, block = m.heads, m.kv_heads, m.head_dim, 16

    def inputs(S: int, length: int) -> Inputs:
        blocks = S * length // block
        tables = torch.randperm(blocks, device=DEVICE).int().view(S, -1)
        cu = torch.arange(S + 1, dtype=torch.int32, device=DEVICE)
        lens = torch.full((S,), length, dtype=torch.int32, device=DEVICE)
        caches = {n: randn(blocks, block, G, D) for n in ("k_cache", "v_cache")}
        lengths = {"cu_seqlens": cu, "context_lens": lens, "block_tables": tables}
        return {"q": randn(S, H, D)} | caches | lengths | {"scale": D**-0.5}

    for S, length in product(BATCHES, CONTEXTS):
        if 4 * S * length * G * D > CACHE_BYTES:
            continue
        flops, num_bytes = 4 * S * H * D * length, 4 * S * (length * G + H) * D
        ours = partial(attention_paged, max_query_len=1, max_context_len=length)
        functions = partial(inputs, S, length), ours, attention_paged_ref, paged_attention(length)
        shape, goal = f"{name} {S} of {length}×({H}/{G})×{D}", "paged decoding, of stream"
        yield Case("attention_paged", shape, flops, num_bytes, *functions, goal)


# ---- sampling --------------------------------------------------------------------------------------------------------

DRAWS = {  # temperature, top-k, top-p
    "greedy": (0.0, 0, 1.0),
    "plain": (1.0, 0, 1.0),
    "top-k": (1.0, 50, 1.0),
    "top-p": (1.0, 0, 0.9),
    "top-k and top-p": (1.0, 50, 0.9),
}


def sampling_cases(name: str, m: Model) -> Iterator[Case]:
    """One token for each of some rows of logits, all by the same parameters."""
    V = m.vocabulary

    def inputs(B: int, temperature: float, top_k: int, top_p: float) -> Inputs:
        logits, given = 4 * randn(B, V), {"temperature": temperature, "top_p": top_p, "min_p": 0.0}
        logits[:, :: V // 8 + 1] += 24  # eight tokens weigh so much that rounding makes no draw another
        columns = {name: torch.full((B,), x, device=DEVICE) for name, x in given.items()}
        columns["top_k"] = torch.full((B,), top_k, dtype=torch.int32, device=DEVICE)
        return {"logits": logits, "uniform": torch.rand(B, dtype=torch.float64, device=DEVICE)} | columns

    def drawn(draw: Function, logits: Tensor, **columns: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logprobs = draw(logits, **columns | {"uniform": columns["uniform"].double()})
        return tokens.float(), logprobs.to(logits.dtype)

    def sort(logits: Tensor, **_: Tensor) -> Tensor:
        return logits.sort(dim=-1, descending=True, stable=True).values

    ours, reference = partial(drawn, sample), partial(drawn, sample_ref)
    for B, (draw, given) in product(BATCHES, DRAWS.items()):
        size, goal = B * V, "drawing by top-p" if draw == "top-p" else ""
        functions = partial(inputs, B, *given), ours, reference, {"sort alone": sort, "eager": reference}
        yield Case("sampling", f"{name} {B}×{V} {draw}", 3 * size, 2 * size + 40 * B, *functions, goal)


OPS = {
    "attention_packed": attention_packed_cases,
    "attention_paged": attention_paged_cases,
    "lora_matmul": lora_matmul_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "sampling": sampling_cases,
    "swiglu": swiglu_cases,
}
