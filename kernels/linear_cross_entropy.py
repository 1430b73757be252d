"""Cross-entropy of a frozen linear head, without ever holding all the logits.

    nll_t = log Σ_v exp(h_t · w_v) − h_t · w_target,    dh_t = Σ_v (softmax_tv − onehot_tv) w_v

The head is frozen, so what backward needs of a token is made in the forward pass, from the logits that it holds anyway:
two matrix products a token in all. On CUDA the unmasked rows are put first on the device, whose count the host never
asks for: tiles past it end at once. Without a gradient no logit is stored, but the target's. A chunk of dh has fewer
tiles than the chip has multiprocessors: several share the vocabulary of one, and add their sums in a fixed order.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep_kernels import cpu
from isheep_kernels.lang import tl, triton
from isheep_kernels.tiles import capability, tile_place
from isheep_kernels.variant import TYPES, Variant

IGNORE = -100
EXTRA_BYTES = 240_000_000  # held beside the inputs and the result, whatever T: a chunk of logits and all partial sums
MAX_SPLITS = 32
# Columns of the vocabulary that take as long as writing a tile's partial sums and reading them again, 8 bytes a value:
# at two operations a column, and the 200 operations a byte of an H200. A chunk's launches take about as long.
SPLIT_COST = 800


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden [T, C], weight [V, C], targets [T] -> negative log-likelihood [T] in fp32, 0 where the target is -100."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=IGNORE, reduction="none")


def _cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Negative log-likelihood [N] fp32 of logits [N, V]; with `gradient` they become softmax − onehot, in place."""
    if cpu.serves(logits):
        nll = torch.empty(len(logits), dtype=torch.float32)
        pointers = logits.data_ptr(), targets.data_ptr(), nll.data_ptr()
        cpu.kernel("cross_entropy", logits.dtype)(*pointers, *logits.shape, gradient)
        return nll
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    if gradient:
        probs = log_probs.exp_()
        probs.scatter_add_(1, targets[:, None], probs.new_full((len(probs), 1), -1.0))
        logits.copy_(probs)
    return nll


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy_ref`, `chunk` rows at a time, on the unmasked rows only.

    The gradient of a row's loss by its hidden state, (softmax − onehot) · weight, depends on that row alone. So the
    forward pass, which holds a chunk's probabilities anyway, makes it at once, and backward only scales it by the
    incoming gradient: two matrix products a token in all, and no logits kept or made twice.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        rows = (targets != IGNORE).nonzero().squeeze(1)
        nll = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        by_hidden = hidden.new_empty(len(rows), hidden.shape[1]) if ctx.needs_input_grad[0] else None
        counted = targets[rows]
        if ((counted < 0) | (counted >= len(weight))).any():  # one answer, so that a device is asked once
            raise IndexError(f"a target is out of bounds of the vocabulary of {len(weight)}")
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            logits = hidden[part] @ weight.t()
            nll[part] = _cross_entropy_(logits, counted[start : start + chunk], by_hidden is not None)
            if by_hidden is not None:
                torch.mm(logits, weight, out=by_hidden[start : start + chunk])
        ctx.save_for_backward(by_hidden, rows)
        return nll

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, rows = ctx.saved_tensors
        grad_hidden = by_hidden.new_zeros(len(grads[0]), by_hidden.shape[1])
        grad_hidden[rows] = (by_hidden * grads[0][rows, None]).to(by_hidden.dtype)
        return grad_hidden, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Negative log-likelihood [T] (fp32) of targets under softmax(hidden weightᵀ), differentiable by hidden.

    hidden [T, C], weight [V, C] frozen, targets [T] int64, -100 = not counted (loss 0, no gradient). Extra memory is
    `chunk` rows of logits, whatever T. Raises IndexError where a target is outside the vocabulary.
    """
    return LinearCrossEntropy.apply(hidden, weight, targets, chunk)


# ---- Triton ----------------------------------------------------------------------------------------------------------


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`linear_cross_entropy_ref` in Triton, on the unmasked rows, with the gradient of hidden; nothing is synchronised.

    hidden [T, C], weight [V, C] in one of fp32, fp16 and bf16, targets [T] int64. Beside them and dh at most 256 MB, at
    a vocabulary of 152,064, and some forty bytes a token. A target outside the vocabulary makes its row's loss and
    gradient nan.
    """
    (T, C), V = hidden.shape, len(weight)
    if weight.shape != (V, C) or targets.shape != (T,) or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"targets {tuple(targets.shape)} {targets.dtype}"
        )
    if hidden.dtype not in TYPES or weight.dtype != hidden.dtype:
        raise ValueError(f"linear_cross_entropy: hidden {hidden.dtype}, weight {weight.dtype}")
    return _FusedLinearCrossEntropy.apply(hidden.contiguous(), weight.contiguous(), targets)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Keeps dh of a loss of 1 a row; backward scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        by_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        _launch_chunks(hidden, weight, targets, nll, by_hidden)
        ctx.save_for_backward(by_hidden)
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        return torch.mul(by_hidden, grads[0][:, None], out=torch.empty_like(by_hidden)), None, None


def _launch_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, nll: Tensor, by_hidden: Tensor | None) -> None:
    """Fill nll [T] and by_hidden [T, C] in the unmasked rows, as many at a time as EXTRA_BYTES allows."""
    (T, C), V = hidden.shape, len(weight)
    if not T:
        return
    masked = targets == IGNORE
    rows, count = masked.byte().argsort(stable=True), T - masked.sum()
    sought, picked = targets[rows], torch.full((T,), torch.nan, device=hidden.device)  # nan where no column is sought
    gradient, chip = by_hidden is not None, capability(hidden)
    tile, dh_tile = _tile(V, hidden.dtype, chip), _tile(C, hidden.dtype, chip)
    size, splits = _shares(T, C, V, hidden.itemsize, tile, dh_tile, _multiprocessors(hidden), gradient)
    blocks, across, tiles = size // tile["BLOCK_M"], triton.cdiv(C, dh_tile["BLOCK_N"]), triton.cdiv(V, tile["BLOCK_N"])
    share = triton.cdiv(V, splits * dh_tile["BLOCK_K"]) * dh_tile["BLOCK_K"]
    logits = hidden.new_empty(size, V) if gradient else None
    parts = hidden.new_empty(splits, size, C, dtype=torch.float32) if splits > 1 else None
    peaks, sums = hidden.new_empty(2, size, tiles, dtype=torch.float32)
    for start in range(0, T, size):
        where = (rows, count, start)
        _logits_kernel[(blocks * tiles,)](
            hidden, weight, sought, *where, logits, peaks, sums, picked, size, V, C,
            STORE=gradient, EVEN_K=C % tile["BLOCK_K"] == 0, **tile,
        )  # fmt: skip
        _nll_kernel[(size,)](
            logits, peaks, sums, picked, sought, *where, nll, V, tiles, GRADIENT=gradient, **NLL_LAUNCH
        )
        if gradient:
            flags = {"SPLIT": splits > 1, "EVEN_K": V % dh_tile["BLOCK_K"] == 0}
            _by_hidden_kernel[(blocks * across, splits)](
                logits, weight, *where, by_hidden if parts is None else parts, size, V, C, share, **flags, **dh_tile
            )
        if parts is not None:
            _join_kernel[(size, triton.cdiv(C, JOIN_LAUNCH["BLOCK"]))](
                parts, *where, by_hidden, size, C, splits, **JOIN_LAUNCH
            )


def _shares(
    T: int, C: int, V: int, itemsize: int, tile: dict[str, int], dh_tile: dict[str, int], slots: int, gradient: bool
) -> tuple[int, int]:
    """Rows a chunk, in whole blocks, and among how many programs dh splits the vocabulary: what ends soonest.

    A chunk with its partial sums stays below EXTRA_BYTES. All work comes in tiles, of which `slots` are made at a time.
    """
    block, blocks = tile["BLOCK_M"], triton.cdiv(T, tile["BLOCK_M"])
    tiles = triton.cdiv(V, tile["BLOCK_N"])  # of the logits, a block of rows
    across = triton.cdiv(C, dh_tile["BLOCK_N"]) if gradient else 0  # and of dh
    row_bytes = 8 * tiles + (V * itemsize if gradient else 0)

    def most_blocks(splits: int) -> int:
        part_bytes = 4 * C * splits if splits > 1 else 0
        return min(max(EXTRA_BYTES // (block * (row_bytes + part_bytes)), splits == 1), blocks)

    def duration(height: int, splits: int) -> int:
        """Of all chunks of `height` blocks: columns that a multiprocessor walks, times the width of its tile."""
        chunks, rest = divmod(blocks, height)

        def waves(width: int) -> int:
            return chunks * triton.cdiv(height * width, slots) + triton.cdiv(rest * width, slots)

        logits = waves(tiles) * C + triton.cdiv(blocks, height) * SPLIT_COST
        dh = waves(across * splits) * (triton.cdiv(V, splits) + (SPLIT_COST if splits > 1 else 0))
        return tile["BLOCK_N"] * logits + dh_tile["BLOCK_N"] * dh

    least = max(most_blocks(1) * 3 // 4, 1)  # each chunk reads the weight twice: low ones would wait for it
    most_splits = MAX_SPLITS if gradient else 1
    shapes = ((h, s) for s in range(1, most_splits + 1) for h in range(least, most_blocks(s) + 1))
    height, splits = min(shapes, key=lambda shape: duration(*shape))
    return height * block, splits


def _multiprocessors(x: Tensor) -> int:
    """Each makes one tile of dh at a time, which takes most of its shared memory. In the interpreter, one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def _tile(columns: int, dtype: torch.dtype, chip: int) -> dict[str, int]:
    """Of the logits or of dh. Hopper takes twice as many columns where a fifth of them would not lie past the edge.

    In fp32 products are exact, without tensor cores: for checks, not for speed.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    narrow = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    if chip < 90:
        return narrow
    wide = 4 * 256 * triton.cdiv(columns, 256) <= 5 * columns
    return narrow | ({"BLOCK_N": 256} if wide else {"num_stages": 4})


JOIN_LAUNCH = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}
NLL_LAUNCH = {"BLOCK": 4096, "num_warps": 8, "num_stages": 2}


@triton.jit(do_not_specialize=["start", "size"])
def _logits_kernel(
    hidden, weight, sought, rows, count, start, logits, peaks, sums, picked, size, V, C,
    STORE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the logits [size, V] of tokens rows[start …]: its rows' largest, and Σ exp(logit − largest).

    picked[start …] is the logit of column sought[start …], written by the tile that holds it; logits are stored with
    STORE alone.
    """
    i, j = tile_place(tl.program_id(0), size, V, BLOCK_M, BLOCK_N)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    local, first_column = (i * BLOCK_M).to(tl.int32) + m, j * BLOCK_N  # 64 bits would cost registers
    place = start + local
    counted = tl.load(count)
    if start + i * BLOCK_M >= counted:
        return
    is_row = place < counted
    token = tl.load(rows + place, is_row, other=0)
    has_row, has_column = is_row[:, None], (n < (V - first_column).to(tl.int32))[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        h_at, w_at = token[:, None] * C + k[None, :], first_column * C + n[None, :] * C + k[:, None]
        if EVEN_K:
            h, w = tl.load(hidden + h_at, has_row, other=0.0), tl.load(weight + w_at, has_column, other=0.0)
        else:
            h = tl.load(hidden + h_at, has_row & (k < C)[None, :], other=0.0)
            w = tl.load(weight + w_at, has_column & (k < C)[:, None], other=0.0)
        total = tl.dot(h, w, total, input_precision="ieee")

    if STORE:  # the gradient is taken of the logits as stored, so their sum is too
        stored = total.to(hidden.dtype.element_ty)
        logits += i * BLOCK_M * V + first_column
        tl.store(logits + m[:, None] * V + n[None, :], stored, has_row & has_column)
        total = stored.to(tl.float32)
    target = tl.load(sought + place, is_row, other=-1)
    here = n[None, :] == (target - first_column).to(tl.int32)[:, None]
    in_tile = is_row & (target >= first_column) & (target < tl.minimum(first_column + BLOCK_N, V))
    tl.store(picked + place, tl.sum(tl.where(here, total, 0.0), 1), in_tile)
    total = tl.where(has_column, total, float("-inf"))
    peak = tl.max(total, 1)
    at = local * tl.cdiv(V, BLOCK_N) + j
    tl.store(peaks + at, peak, is_row)
    tl.store(sums + at, tl.sum(tl.exp(total - peak[:, None]), 1), is_row)


@triton.jit(do_not_specialize=["start"])
def _nll_kernel(
    logits, peaks, sums, picked, sought, rows, count, start, nll, V, tiles,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row program_id of a chunk: its loss from the tiles' partial sums; with GRADIENT, softmax − onehot in its logits.

    A target that no tile picked leaves a nan, in the loss and in the gradient.
    """
    local = tl.program_id(0).to(tl.int64)
    place = start + local
    if place >= tl.load(count):
        return
    token = tl.load(rows + place)
    at = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, tiles, BLOCK):
        peak = tl.maximum(peak, tl.load(peaks + local * tiles + first + at, first + at < tiles, other=float("-inf")))
    highest = tl.max(peak, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, BLOCK):
        inside = first + at < tiles
        peak = tl.load(peaks + local * tiles + first + at, inside, other=float("-inf"))
        total += tl.load(sums + local * tiles + first + at, inside, other=0.0) * tl.exp(peak - highest)
    log_total = tl.log(tl.sum(total, 0))
    loss = log_total - (tl.load(picked + place) - highest)
    tl.store(nll + token, loss)
    if GRADIENT:
        target = tl.load(sought + place)
        for first in range(0, V, BLOCK):
            column = first + at
            logit = tl.load(logits + local * V + column, column < V, other=0.0).to(tl.float32)
            change = tl.exp(logit - highest - log_total) - tl.where(column == target, 1.0, 0.0) + (loss - loss)
            tl.store(logits + local * V + column, change, column < V)


@triton.jit(do_not_specialize=["start", "size"])
def _by_hidden_kernel(
    change, weight, rows, count, start, out, size, V, C, share,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of change [size, V] · weight [V, C], written to out [T, C] at tokens rows[start …].

    With SPLIT its part from the `share` columns of the vocabulary that are this program's, to out [splits, size, C].
    Grid: tiles, splits.
    """
    i, j = tile_place(tl.program_id(0), size, C, BLOCK_M, BLOCK_N)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    local = i * BLOCK_M + m
    counted = tl.load(count)
    if start + i * BLOCK_M >= counted:
        return
    is_row = start + local < counted
    columns = j * BLOCK_N + n
    has_row, has_column = is_row[:, None], (columns < C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, V), BLOCK_K):
        v = first + tl.arange(0, BLOCK_K).to(tl.int64)
        d_at, w_at = local[:, None] * V + v[None, :], v[:, None] * C + columns[None, :]
        if EVEN_K:
            d, w = tl.load(change + d_at, has_row, other=0.0), tl.load(weight + w_at, has_column, other=0.0)
        else:
            d = tl.load(change + d_at, has_row & (v < V)[None, :], other=0.0)
            w = tl.load(weight + w_at, has_column & (v < V)[:, None], other=0.0)
        total = tl.dot(d, w, total, input_precision="ieee")
    if SPLIT:
        out += (tl.program_id(1) * size.to(tl.int64) + i * BLOCK_M) * C + j * BLOCK_N
        tl.store(out + m[:, None] * C + n[None, :], total, has_row & has_column)
    else:
        token = tl.load(rows + start + local, is_row, other=0)
        tl.store(out + token[:, None] * C + columns[None, :], total, has_row & has_column)


@triton.jit(do_not_specialize=["start", "size", "splits"])
def _join_kernel(parts, rows, count, start, by_hidden, size, C, splits, BLOCK: tl.constexpr):
    """by_hidden [T, C] at one of the tokens rows[start …]: Σ_s parts [splits, size, C]. Grid: size, blocks of C."""
    local = tl.program_id(0).to(tl.int64)
    place = start + local
    if place >= tl.load(count):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + (split * size.to(tl.int64) + local) * C + column, column < C, other=0.0)
    tl.store(by_hidden + tl.load(rows + place) * C + column, total, column < C)


def variants(capability: int) -> Iterator[Variant]:
    """bf16, with and without the gradient; its tile is the narrower one where the hidden size fits no wider."""
    half = f"*{TYPES[torch.bfloat16]}"
    types = dict.fromkeys(("hidden", "weight", "logits", "change", "out", "by_hidden"), half)
    types |= dict.fromkeys(("peaks", "sums", "picked", "nll", "parts"), "*fp32")
    types |= dict.fromkeys(("sought", "rows", "count"), "*i64")
    types |= dict.fromkeys(("start", "size", "V", "C", "tiles", "share", "splits"), "i32")
    alone = {"STORE": False, "GRADIENT": False, "logits": None}
    for name, stored in (("forward", alone), ("with gradient", {"STORE": True, "GRADIENT": True})):
        tile = _tile(152_064, torch.bfloat16, capability) | {"EVEN_K": True}
        yield _variant(f"logits {name}", _logits_kernel, types, tile | stored)
        yield _variant(f"nll {name}", _nll_kernel, types, NLL_LAUNCH | stored)
    for C, narrow in ((4096, ""), (576, " narrow")):
        tile = _tile(C, torch.bfloat16, capability) | {"EVEN_K": True}
        for name, out, split in (("", half, False), (" split", "*fp32", True)):
            types["out"] = out
            yield _variant(f"by hidden{narrow}{name}", _by_hidden_kernel, types, tile | {"SPLIT": split})
    yield _variant("join", _join_kernel, types, JOIN_LAUNCH)


def _variant(name: str, kernel: Any, types: dict[str, str], launch: dict[str, Any]) -> Variant:
    made = Variant.of(f"linear_cross_entropy {name} bf16", kernel, types, launch)
    multiples = tuple(n for n in ("V", "C", "share") if n in made.signature)
    return made._replace(divisible_by_16=made.divisible_by_16 + multiples)
