"""Drawing the next token: temperature, top-k, top-p, min-p, and the model's own log-probability of what was drawn.

The definition sorts a row of 152,064 logits to keep a hundred of them. In Triton nothing is sorted. What top-k and
top-p keep is a prefix of the ranking, so it is enough to know where it ends: at a logit and, among the tokens that
share it, at an id. The logit is searched for in the order of its bits, eight ways a pass, by adding up what lies above
each of eight pivots. A program draws for one row, which comes from memory once and from the level-2 cache after that:

    always    3 passes: the best logit; the weight of the survivors, tile by tile; that of all, for the log-probability
    top-k     up to 7 more: 16 bits found three at a time, then the id; where logits are mostly above zero, 4 or so
    top-p     about 5 more: what is left, the few hundred logits that the cut can be, then the id
    in fp32   6 more for each of these
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isheep_kernels.lang import tl, triton
from isheep_kernels.variant import TYPES, Variant

BLOCK = 2048  # logits at a time, four a thread
PIVOTS = tl.constexpr(8)
LAST = tl.constexpr(2**31 - 1)  # no token has a larger id
BELOW = tl.constexpr(-(2**31))  # every logit has a larger key
LEAST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: a row without a possible token has weights of 0, not nan


def sample_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """logits [B, V]; temperature, top_p, min_p [B] fp32; top_k [B] int32 (0 = all); uniform [B] fp64 in [0, 1).

    -> tokens [B] int64, log-probabilities [B] fp32 under the untouched model. Temperature 0: the likeliest token.
    Tokens are ranked by falling probability (ties: by id) and cut by top-k, then to the smallest set that holds top-p
    of what is left, then by min-p times the best. `uniform` picks along the survivors' cumulative sum, by rising id.
    """
    plain = logits.to(torch.promote_types(logits.dtype, torch.float32))
    hot = temperature > 0
    probs = torch.softmax(plain / torch.where(hot, temperature, 1.0)[:, None], -1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[1], device=probs.device)
    ranked = ranked * ((top_k <= 0)[:, None] | (place < top_k[:, None]))
    before = ranked.double().cumsum(-1) - ranked
    keep = (before < top_p[:, None] * ranked.double().sum(-1, keepdim=True)) | (top_p >= 1)[:, None]
    keep &= ranked >= min_p[:, None] * ranked[:, :1]
    kept = torch.zeros_like(probs).scatter(1, order, ranked * keep)
    cumulative = kept.double().cumsum(-1)
    pick = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(-1)
    last = (kept > 0).long().cumsum(-1).argmax(-1)  # rounding never steps past the last survivor
    tokens = torch.where(hot, torch.minimum(pick, last), plain.argmax(-1))
    return tokens, plain.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample_ref` in Triton, for logits in fp32, fp16 or bf16, whose rows may lie apart.

    The token is the definition's in exact arithmetic for some uniform, top-p and min-p within 1e-6 of those given. The
    same inputs give the same bits, in one launch that asks the device for nothing. A row without a possible token gives
    some token of the vocabulary, of log-probability nan. ValueError where shapes or dtypes do not fit.
    """
    B, V = logits.shape
    parameters = temperature, top_k, top_p, min_p, uniform
    dtypes = [torch.float32, torch.int32, torch.float32, torch.float32, torch.float64]
    if logits.dtype not in TYPES or [x.dtype for x in parameters] != dtypes or any(x.shape != (B,) for x in parameters):
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (logits, *parameters))
        raise ValueError(f"sample: logits, temperature, top_k, top_p, min_p, uniform are {given}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    if B:
        columns = (x.contiguous() for x in parameters)
        _sample_kernel[(B,)](logits, *columns, tokens, logprobs, V, logits.stride(0), **_launch(V))
    return tokens, logprobs


def _launch(V: int) -> dict[str, int]:
    """Blocks of a row, and how many of them there may be."""
    block = min(BLOCK, max(triton.next_power_of_2(V), 128))
    tiles = triton.next_power_of_2(triton.cdiv(V, block))
    return {"BLOCK": block, "TILES": tiles, "num_warps": block // 128, "num_stages": 1}


# ---- the kernel: a row points to V logits; a weight is exp((logit − best) · rate), rate one over the temperature -----


# not once for each alignment: the parameters may be slices of one copy from the host
@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "uniform", "tokens", "logprobs"])
def _sample_kernel(
    logits, temperature, top_k, top_p, min_p, uniform, tokens, logprobs, V, stride,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row. Keys above `cut` survive and, at the cut, ids up to `last`; of them all that weigh `floor` or more."""
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * stride
    best, common = _best(row, V, BLOCK)
    highest = _key(best.to(row.dtype.element_ty))
    heat, k, p = tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b)
    hot = heat > 0
    rate = 1 / tl.where(hot, heat, 1.0)
    cut, last = tl.where(hot, BELOW, highest), tl.full([], LAST, tl.int32)
    if hot & (k > 0) & (k < V):
        low = _key(tl.where(k <= BLOCK, common, -float("inf")).to(row.dtype.element_ty))
        cut, last = _prefix(row, V, best, rate, cut, last, low, highest, k.to(tl.float64), False, BLOCK, TILES)
    if hot & (p < 1):
        left = tl.sum(_sums(row, V, best, rate, cut, last, 0.0, False, BLOCK, TILES), 0)
        # whatever weighs less than (1 − p) / V weighs, all together, less than top-p leaves out
        light = _key((best + tl.log((1 - p) / V) * heat).to(row.dtype.element_ty)) - 1
        low = tl.maximum(cut, light)
        cut, last = _prefix(row, V, best, rate, cut, last, low, highest, p * left, True, BLOCK, TILES)
    floor, u = tl.where(hot, tl.load(min_p + b), 0.0), tl.where(hot, tl.load(uniform + b), 0.0)
    sums = _sums(row, V, best, rate, cut, last, floor, False, BLOCK, TILES)
    token = _find(row, V, best, rate, cut, last, floor, sums, u * tl.sum(sums, 0), False, BLOCK, TILES)
    mass = tl.sum(_sums(row, V, best, 1.0, BELOW, LAST, 0.0, False, BLOCK, TILES), 0)
    tl.store(tokens + b, token)
    tl.store(logprobs + b, tl.load(row + token).to(tl.float64) - best - tl.log(mass))


@triton.jit
def _best(row, V, BLOCK: tl.constexpr):
    """The largest logit of a row, and one that BLOCK of them reach, if there are as many; fp32."""
    high = tl.full([BLOCK], LEAST, tl.float32)
    for start in range(0, V, BLOCK):
        high = tl.maximum(high, _load(row, start, V, BLOCK)[1].to(tl.float32))
    return tl.max(high, 0), tl.min(high, 0)


@triton.jit
def _prefix(
    row, V, best, rate, cut, last, low, high, need, MASS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Where the shortest prefix of the survivors' ranking that adds up to `need` ends: its cut and its last.

    A token adds its weight with MASS, else one. `need` fp64; the keys `low` and `high` int32 bound the new cut.
    """
    above = tl.full([], 0.0, tl.float64)  # what keys beyond high add up to
    while low < high:
        step = ((high.to(tl.int64) - low + PIVOTS) // PIVOTS).to(tl.int32)  # 32 bits do not hold the difference
        pivots = low + step * tl.arange(0, PIVOTS)
        reached = _reached(row, V, best, rate, pivots, MASS, BLOCK)
        enough = reached >= need
        above = tl.max(tl.where(enough, above, reached), 0)
        low += step * tl.maximum(tl.sum(enough.to(tl.int32), 0) - 1, 0)
        high = tl.minimum(high, low + step - 1)
    last = tl.where(low == cut, last, LAST)
    value = _value(low, row.dtype.element_ty).to(tl.float32)
    as_best = tl.exp((best - value) * rate) if MASS else 1.0  # so many at the cut add what the best does
    ties = _sums(row, V, best, rate, low, last, 0.0, True, BLOCK, TILES)
    wanted = tl.ceil((need - above) * as_best)
    return low, _find(row, V, best, rate, low, last, 0.0, ties, wanted - 1, True, BLOCK, TILES)


@triton.jit
def _reached(row, V, best, rate, pivots, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """What the tokens from each of the keys `pivots` [PIVOTS] up add up to, fp64: weights with MASS, else ones."""
    QUADS: tl.constexpr = BLOCK // 4  # a thread adds up its four before it keeps them
    total = tl.zeros([PIVOTS, QUADS], tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + 4 * tl.arange(0, QUADS)[None, :, None] + tl.arange(0, 4)[None, None, :]
        x = tl.load(row + ids, ids < V, other=-float("inf"))
        adds = _weights(x, best, rate) if MASS else 1.0
        total += tl.sum(tl.where(_key(x) >= pivots[:, None, None], adds, 0.0), 2)
    return tl.sum(total, 1).to(tl.float64)


@triton.jit
def _sums(row, V, best, rate, cut, last, floor, TIES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """What the tokens of each tile add up to (`_counts`) -> [TILES] fp64."""
    tile = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.float64)
    for start in range(0, V, BLOCK):
        ids, x = _load(row, start, V, BLOCK)
        counts = _counts(ids, x, best, rate, cut, last, floor, TIES)
        sums = tl.where(tile == start // BLOCK, tl.sum(counts, 0).to(tl.float64), sums)
    return sums


@triton.jit
def _find(
    row, V, best, rate, cut, last, floor, sums, target, TIES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The first token up to which, by rising id, tokens add up to more than `target`; `sums` are their tiles'."""
    tile = _first_beyond(sums, target, TILES)
    before = tl.sum(tl.where(tl.arange(0, TILES) < tile, sums, 0.0), 0)
    ids, x = _load(row, tile * BLOCK, V, BLOCK)
    return tile * BLOCK + _first_beyond(_counts(ids, x, best, rate, cut, last, floor, TIES), target - before, BLOCK)


@triton.jit
def _first_beyond(counts, target, N: tl.constexpr):
    """Where the cumulative sum of counts [N] first exceeds `target`; rounding never steps past the last above 0."""
    place = tl.sum((tl.cumsum(counts.to(tl.float64), 0) <= target).to(tl.int32), 0)
    return tl.minimum(place, tl.max(tl.where(counts > 0, tl.arange(0, N), 0), 0))


@triton.jit
def _counts(ids, x, best, rate, cut, last, floor, TIES: tl.constexpr):
    """What tokens add, fp32: a survivor its weight or, with TIES, one at the cut 1; all others 0."""
    key = _key(x)
    if TIES:
        return ((key == cut) & (ids <= last)).to(tl.float32)
    weights = _weights(x, best, rate)
    return tl.where((key < cut) | (key == cut) & (ids > last) | (weights < floor), 0.0, weights)  # nan stays


@triton.jit
def _weights(x, best, rate):
    """What the logits x weigh, fp32: the best one 1."""
    return tl.exp((x.to(tl.float32) - best) * rate)


@triton.jit
def _load(row, start, V, BLOCK: tl.constexpr):
    """Ids int32 and logits [BLOCK] from `start` on, −inf beyond the row."""
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(row + ids, ids < V, other=-float("inf"))


@triton.jit
def _key(x):
    """Whole numbers int32 in the order of the floats x, as close together as they can be; −0 and 0 have the same."""
    INT: tl.constexpr = tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32
    return _mirror(x.to(INT, bitcast=True)).to(tl.int32)


@triton.jit
def _value(key, dtype: tl.constexpr):
    """The float of this type that has this key."""
    INT: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
    return _mirror(key.to(INT)).to(dtype, bitcast=True)


@triton.jit
def _mirror(bits):
    """Negative floats fall as their bits, read as a whole number, rise: turned round, and back by the same."""
    LOWEST: tl.constexpr = -(2 ** (bits.dtype.primitive_bitwidth - 1))
    return tl.where(bits < 0, LOWEST - bits, bits)


def variants(capability: int) -> Iterator[Variant]:
    """A row of logits of Qwen1.5's larger models, in bf16 and, as penalties and masks leave it, in fp32."""
    parameters = {"temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32", "uniform": "*fp64"}
    types = parameters | {"tokens": "*i64", "logprobs": "*fp32", "V": "i32", "stride": "i32"}
    for dtype in (torch.bfloat16, torch.float32):
        given = types | {"logits": f"*{TYPES[dtype]}"}
        variant = Variant.of(f"sampling {TYPES[dtype]} V152064", _sample_kernel, given, _launch(152064))
        yield variant._replace(divisible_by_16=(*variant.divisible_by_16, "V", "stride"))
