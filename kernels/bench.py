"""The kernels against the limit of the chip and against their rivals.

    python -m isheep_kernels.bench [op …] [--chip h200|h100|a100|a800] [--csv FILE]

Without a GPU it prints, for each op and shape, the floating-point operations and bytes that the work cannot do without
and the time that the named chip's data sheet allows: a limit, nothing measured. With one it first compares the op with
its definition, stops where that fails, and then times it, in bf16, in turns with its rivals and with what the chip
does in the same run: copying, and a large product. Ratios are of neighbouring turns; the band holds 20 to 80 % of them.
"""

import argparse
import csv
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate, product
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from isheep_kernels.attention_packed import attention_packed, attention_packed_ref
from isheep_kernels.attention_paged import attention_paged, attention_paged_ref
from isheep_kernels.linear_cross_entropy import fused_linear_cross_entropy, linear_cross_entropy_ref
from isheep_kernels.lora_matmul import FUSED_UP_TO, lora_matmul, lora_matmul_ref
from isheep_kernels.rms_norm import rms_norm, rms_norm_add, rms_norm_ref
from isheep_kernels.rope import rope, rope_ref
from isheep_kernels.swiglu import swiglu, swiglu_ref


class Chip(NamedTuple):
    """A data sheet: dense bf16 operations and bytes of memory a second."""

    flops: float
    bytes: float


CHIPS = {
    "h200": Chip(989e12, 4.8e12),
    "h100": Chip(989e12, 3.35e12),
    "a100": Chip(312e12, 2.04e12),
    "a800": Chip(312e12, 2.04e12),
}


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
LENGTHS = (1024, 4096, 8192)  # of a sequence; the definition's scores of a longer one would fill the GPU
MIX = tuple(random.Random(0).choices(range(100, 2001), k=16))  # lengths of rows of instruction tuning, packed
BATCHES, CONTEXTS = (32, 256), (512, 2048)  # sequences in the cache, and how long each is
DEVICE, DTYPE = "cuda", torch.bfloat16

Inputs = dict[str, Any]
Function = Callable[..., Any]


class Case(NamedTuple):
    """One op on one shape. Functions take `inputs()`, made on the GPU; `reference` is what ours is compared with."""

    op: str
    shape: str
    flops: float
    bytes: float
    inputs: Callable[[], Inputs]
    ours: Function
    reference: Function
    rivals: dict[str, Function]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def with_backward(case: Case, trained: tuple[str, ...], flops: float, num_bytes: float) -> Case:
    """The gradients of the inputs `trained`, made by a forward and a backward pass; the counts are of both."""

    def inputs() -> Inputs:
        given = case.inputs()
        ys = outputs(case.ours(**given))
        leaves = {name: given[name].requires_grad_() for name in trained}
        return given | leaves | {f"dy{i}": torch.randn_like(y) for i, y in enumerate(ys)}

    def backward(function: Function, **given: Any) -> tuple[Tensor, ...]:
        dys = [given.pop(name) for name in sorted(given) if name.startswith("dy")]
        return torch.autograd.grad(outputs(function(**given)), [given[name] for name in trained], dys)

    rivals = {name: partial(backward, rival) for name, rival in case.rivals.items()}
    functions = partial(backward, case.ours), partial(backward, case.reference), rivals
    return Case(case.op, f"{case.shape} and backward", case.flops + flops, case.bytes + num_bytes, inputs, *functions)


# ---- cases: bf16 is two bytes ----------------------------------------------------------------------------------------


def rms_norm_cases(name: str, m: Model) -> Iterator[Case]:
    size = TRAIN * m.hidden

    def inputs(*names: str) -> Inputs:
        return {n: randn(TRAIN, m.hidden) for n in names} | {"weight": randn(m.hidden), "eps": 1e-6}

    def added(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm_ref(x + residual, weight, eps), x + residual

    shape = f"{name} {TRAIN}×{m.hidden}"
    compiled = {"torch.compile": _compiled(rms_norm_ref)}
    alone = Case("rms_norm", shape, 4 * size, 4 * size, partial(inputs, "x"), rms_norm, rms_norm_ref, compiled)
    yield from (alone, with_backward(alone, ("x",), 9 * size, 6 * size))
    both, rivals = partial(inputs, "x", "residual"), {"torch.compile": _compiled(added)}
    summed = Case("rms_norm", f"{shape} + residual", 5 * size, 8 * size, both, rms_norm_add, added, rivals)
    yield from (summed, with_backward(summed, ("x", "residual"), 10 * size, 8 * size))


def rope_cases(name: str, m: Model) -> Iterator[Case]:
    size, D = TRAIN * (m.heads + m.kv_heads) * m.head_dim, m.head_dim

    def inputs() -> Inputs:
        angle = torch.rand(TRAIN, D // 2, device=DEVICE) * 6
        return {"q": randn(TRAIN, m.heads, D), "k": randn(TRAIN, m.kv_heads, D), "cos": angle.cos(), "sin": angle.sin()}

    def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope_ref(q, cos, sin), rope_ref(k, cos, sin)

    shape, rivals = f"{name} {TRAIN}×({m.heads}+{m.kv_heads})×{D}", {"torch.compile": _compiled(reference)}
    forward = Case("rope", shape, 3 * size, 4 * size + 4 * TRAIN * D, inputs, rope, reference, rivals)
    yield from (forward, with_backward(forward, ("q", "k"), forward.flops, forward.bytes))


def swiglu_cases(name: str, m: Model) -> Iterator[Case]:
    size, rivals = TRAIN * m.inner, {"torch.compile": _compiled(swiglu_ref)}

    def inputs() -> Inputs:
        return {"gate": randn(TRAIN, m.inner), "up": randn(TRAIN, m.inner)}

    forward = Case("swiglu", f"{name} {TRAIN}×{m.inner}", 5 * size, 6 * size, inputs, swiglu, swiglu_ref, rivals)
    yield from (forward, with_backward(forward, ("gate", "up"), 10 * size, 10 * size))


def lora_matmul_cases(name: str, m: Model) -> Iterator[Case]:
    """Forward, beside its floor, the base product alone, and both forms that `FUSED_UP_TO` chooses from."""

    def inputs(T: int, K: int, N: int) -> Inputs:
        a, b = torch.randn(RANK, K, device=DEVICE) / K**0.5, torch.randn(N, RANK, device=DEVICE)
        return {"x": randn(T, K), "w": randn(N, K) / K**0.5, "bias": None, "a": a, "b": b, "scale": 2.0}

    def base(x: Tensor, w: Tensor, **_: Any) -> Tensor:
        return F.linear(x, w)

    def form(widest: int, **inputs: Any) -> Tensor:
        with patch.dict(FUSED_UP_TO, dict.fromkeys(FUSED_UP_TO, widest)):
            return lora_matmul(**inputs)

    forms = {"one kernel": partial(form, 1 << 30), "library product and a pass": partial(form, 0)}
    eager = {"eager": lora_matmul_ref, "torch.compile": _compiled(lora_matmul_ref)}
    rivals = {"base product alone": base} | forms | eager
    heads, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    layers = {"q": (m.hidden, heads), "k": (m.hidden, kv), "gate": (m.hidden, m.inner), "down": (m.inner, m.hidden)}
    for T in (TRAIN, DECODE):
        for layer, (K, N) in layers.items():
            flops = 2 * T * (N * K + RANK * (N + K))
            num_bytes = 2 * (T * K + N * K + T * N) + 4 * RANK * (N + K)
            make = partial(inputs, T, K, N)
            shape = f"{name} {layer} {T}×{K}→{N} r{RANK}"
            forward = Case("lora_matmul", shape, flops, num_bytes, make, lora_matmul, lora_matmul_ref, rivals)
            yield forward
            if T == TRAIN:  # dx, da and db: the base product again, and four of the adapter's
                moved = 2 * (T * N + 2 * T * K + N * K) + 8 * RANK * (N + K)
                forward = forward._replace(rivals=forms | eager)  # the base alone has no adapter to train
                yield with_backward(forward, ("x", "a", "b"), flops + 2 * T * RANK * (N + K), moved)


def linear_cross_entropy_cases(name: str, m: Model) -> Iterator[Case]:
    """Loss alone, and loss with the gradient of hidden."""
    T, C, V = TRAIN, m.hidden, m.vocabulary
    product, num_bytes = 2 * T * C * V, 2 * (T * C + V * C) + 12 * T

    def inputs(gradient: bool) -> Inputs:
        hidden, weight = randn(T, C).requires_grad_(gradient), randn(V, C) / C**0.5
        return {"hidden": hidden, "weight": weight, "targets": torch.randint(V, (T,), device=DEVICE)}

    def with_gradient(function: Function, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        nll = function(hidden, weight, targets)
        return nll, *torch.autograd.grad(nll.sum(), hidden)

    def products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        return logits @ weight if hidden.requires_grad else logits

    for gradient in (False, True):
        functions = fused_linear_cross_entropy, linear_cross_entropy_ref, _compiled(linear_cross_entropy_ref)
        ours, ref, compiled = (partial(with_gradient, f) if gradient else f for f in functions)
        rivals = {"products alone": products, "eager": ref, "torch.compile": compiled}
        make, work = partial(inputs, gradient), (product * (1 + gradient), num_bytes + 2 * T * C * gradient)
        shape = f"{name} {T}×{C}→{V}{' with gradient' if gradient else ''}"
        yield Case("linear_cross_entropy", shape, *work, make, ours, ref, rivals)


def attention_packed_cases(name: str, m: Model) -> Iterator[Case]:
    """One causal sequence, which the library's kernels take too, and a packed mix of them."""
    H, G, D = m.heads, m.kv_heads, m.head_dim

    def inputs(*lens: int) -> Inputs:
        cu = torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=DEVICE)
        heads = {"q": H, "k": G, "v": G}
        return {n: randn(sum(lens), h, D) for n, h in heads.items()} | {"cu_seqlens": cu, "scale": D**-0.5}

    def reference(cu_seqlens: Tensor, **rest: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention_packed_ref(cu_seqlens=cu_seqlens.tolist(), **rest)

    def library(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        with sdpa_kernel(backend):
            args = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(*args, is_causal=True, scale=scale, enable_gqa=True)

    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    rivals = {rival: partial(library, backend) for rival, backend in backends.items()}
    for lens, beside in (*(((S,), rivals) for S in LENGTHS), (MIX, packed_rivals(MIX))):
        flops, num_bytes = sum(2 * H * D * S * (S + 1) for S in lens), 4 * sum(lens) * (H + G) * D
        shape = f"{name} {sum(lens)}×({H}/{G})×{D}{f' in {len(lens)}' * (len(lens) > 1)}"
        make, ours = partial(inputs, *lens), attention_packed
        forward = Case("attention_packed", shape, flops, num_bytes, make, ours, reference, beside)
        yield from (forward, with_backward(forward, ("q", "k", "v"), 2.5 * flops, 2 * num_bytes))


def packed_rivals(lens: Sequence[int]) -> dict[str, Function]:
    """What torch has for packed sequences, as far as this version has it."""
    found: dict[str, Function] = {}
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

        def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
            groups = {"enable_gqa": True} if takes_groups else {}
            if not takes_groups:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            ends = cu_seqlens, cu_seqlens, max(lens), max(lens)
            return varlen_attn(q, k, v, *ends, scale=scale, window_size=(-1, 0), **groups)

        found["varlen_attn"] = varlen
    compiled, mask = _compiled(flex_attention), cache(partial(_document_mask, tuple(lens)))

    def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, **_: Any) -> Tensor:
        args = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*args, block_mask=mask(), scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return found | {"FlexAttention": flex}


def _document_mask(lens: tuple[int, ...]) -> Any:
    """A query sees the keys of its own sequence up to itself."""
    owner = torch.arange(len(lens), device=DEVICE).repeat_interleave(torch.tensor(lens, device=DEVICE))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (owner[query] == owner[key]) & (query >= key)

    return create_block_mask(sees, None, None, sum(lens), sum(lens), DEVICE)


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
        flops, num_bytes = 4 * S * H * D * length, 4 * S * (length * G + H) * D
        ours = partial(attention_paged, max_query_len=1, max_context_len=length)
        shape, rivals = f"{name} {S} of {length}×({H}/{G})×{D}", {"gather and SDPA": attention_paged_ref}
        make = partial(inputs, S, length)
        yield Case("attention_paged", shape, flops, num_bytes, make, ours, attention_paged_ref, rivals)


OPS = {
    "attention_packed": attention_packed_cases,
    "attention_paged": attention_paged_cases,
    "lora_matmul": lora_matmul_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "swiglu": swiglu_cases,
}


def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)


# ---- checking and timing ---------------------------------------------------------------------------------------------


def outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def is_right(case: Case, inputs: Inputs) -> bool:
    """Whether ours is no further from the definition in fp32 than twice what the definition in bf16 is."""

    def wide(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().float().requires_grad_(x.requires_grad) if floating else x

    truth = outputs(case.reference(**{name: wide(x) for name, x in inputs.items()}))
    got, ref = outputs(case.ours(**inputs)), outputs(case.reference(**inputs))
    for ours, theirs, true in zip(got, ref, truth, strict=True):
        allowed = 2 * (theirs.float() - true).abs().max()
        floor = torch.finfo(ours.dtype).eps / 2 * true.abs().max()
        if not (ours.float() - true).abs().max() <= torch.maximum(allowed, floor):
            return False
    return True


def gpu_seconds(function: Callable[[], Any]) -> float:
    """One call on a cold cache. The GPU is busy before, so that launches are queued and their work alone is timed."""
    torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE).zero_()
    torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    functions: dict[str, Callable[[], Any]], seconds: Callable[[Callable[[], Any]], float], rounds: int = 30
) -> dict[str, list[float]]:
    """Seconds of each function in each round, forwards and backwards through them by turns, after a round unseen."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names[::-1] if i % 2 else names:
            took = seconds(functions[name])
            if i:
                times[name].append(took)
    return times


def band(ratios: list[float]) -> str:
    fifths = quantiles(ratios, n=5)
    return f"{median(ratios):.3f} ({fifths[0]:.3f}–{fifths[-1]:.3f})"


def ceilings() -> Chip:
    """What this GPU does now: a product of 8192³ in bf16, and a copy of a gigabyte."""
    x, source = randn(8192, 8192), torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    functions = {"product": partial(torch.mm, x, x), "copy": source.clone}
    times = in_turns(functions, gpu_seconds)
    return Chip(2 * 8192**3 / median(times["product"]), 2 * len(source) / median(times["copy"]))


def limit(case: Case, chip: Chip) -> float:
    """Seconds that the chip needs at least."""
    return max(case.flops / chip.flops, case.bytes / chip.bytes)


def counted(case: Case, chip: Chip) -> dict[str, str]:
    bound = "arithmetic" if case.flops / chip.flops > case.bytes / chip.bytes else "memory"
    counts = {"GFLOP": f"{case.flops / 1e9:.2f}", "MB": f"{case.bytes / 1e6:.1f}"}
    return {"op": case.op, "shape": case.shape} | counts | {"limit µs": f"{limit(case, chip) * 1e6:.1f}", "by": bound}


def measured(case: Case, inputs: Inputs, chip: Chip) -> dict[str, str]:
    """Ours in µs and as a fraction of the same run's limit, and how often ours fits into each rival's time."""
    functions = {"ours": case.ours} | case.rivals
    times = in_turns({name: partial(function, **inputs) for name, function in functions.items()}, gpu_seconds)
    ours = median(times["ours"])
    row = counted(case, chip) | {"ours µs": f"{ours * 1e6:.1f}", "of the limit": f"{limit(case, chip) / ours:.3f}"}
    for rival in case.rivals:
        row[f"{rival} / ours"] = band([t / o for t, o in zip(times[rival], times["ours"], strict=True)])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--chip", choices=CHIPS, default="h200", help="the limit's chip, where no GPU is at hand")
    parser.add_argument("--csv", type=argparse.FileType("w"), help="write the rows there as well")
    args = parser.parse_args()
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    here = torch.cuda.is_available()
    if here:
        chip = ceilings()
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}",
            end=", this run: ",
        )
    else:
        chip = CHIPS[args.chip]
        print(f"No GPU here: nothing is measured. What the data sheet of an {args.chip} allows", end=": ")
    print(f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bytes / 1e12:.2f} TB/s")
    rows = []
    for op in args.ops or OPS:
        print(f"\n{op}")
        for case in (case for name, model in MODELS.items() for case in OPS[op](name, model)):
            if here:
                inputs = case.inputs()
                if not is_right(case, inputs):
                    print(f"{case.op} {case.shape} is wrong: nothing is timed", file=sys.stderr)
                    return 1
                rows.append(measured(case, inputs, chip))
            else:
                rows.append(counted(case, chip))
            print(*(f"{name} {value}" for name, value in rows[-1].items() if name != "op"), sep=" · ", flush=True)
    if args.csv:
        writer = csv.DictWriter(args.csv, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
