"""The sampler's passes through the model: decode steps as CUDA graphs, all others kernel by kernel.

Why. A decode step reads every weight and computes next to nothing, in 13 or 14 launches a layer, each of which takes
Python longer than the GPU: kernel by kernel, a pass waits for the host. A graph is a pass's launches, recorded once and
then handed over together.

What is static. A graph knows addresses and numbers, no tensors. Its inputs are the first rows of one set of tensors
into which each step copies its own. Weights and cache stay where they are; an adapter's copies in the compute dtype
are kept as long as a graph that reads them. What lies between, and the hidden states that come out, is in one pool for
all graphs, which is never in use twice at a time; it comes out of the tenth of the free memory that the cache leaves.

What keys a graph. Launches have the number of rows and, in attention, the number of splits built in. Rows are padded
to a few numbers (`padded_rows`) by tokens that write to a spare block of the cache. Splits are chosen for the longest
context rounded up to a power of two, and those that a shorter context leaves empty are no mistake. An adapter has other
tensors than the next, and other copies in each version: a graph serves the one it was recorded for. A new version drops
all graphs and not its own alone, for torch frees what cuBLAS works in for all graphs of a stream together with any one
of them (pytorch/pytorch#193402). So a capture that fails drops them too, and each sampler records on a stream of its
own: of the 32 that torch hands out in turn, which is no promise but is enough for the few samplers alive at a time.

When. A graph is recorded when its key is first met, after a pass that compiles its kernels. Steps with prompts in them,
with two adapters or more than MAX_ROWS rows have work enough to hide their launches behind.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from isheep.config import SamplerConfig
from isheep.model import ops
from isheep.model.batch import PackedBatch, PagedMeta
from isheep.model.transformer import KVCache, Transformer

MAX_ROWS = 256
MOST_PADDING = 7
SPARE_BLOCKS = 1  # at the end of a cache, for padding: given to no sequence

Salts = Mapping[str | None, Hashable]  # an adapter's name, None for the base -> what changes when its numbers do


def padded_rows(num_rows: int) -> int:
    """1, 2, 4, 8, 16, 24, 32 …: tensor cores multiply 8 rows or more, so these cost what the step's own would."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def can_capture(model: Transformer) -> bool:
    """Whether a pass waits nowhere for the host: one rank's, in Triton's kernels.

    The view of one of several ranks sums over all of them within the pass. NCCL's sums can be recorded too, and ranks
    that schedule alike meet the same keys in the same order, as they must; but a slip would hang a run, and nobody has
    tried it on two GPUs. So these go kernel by kernel.
    """
    return model.device.type == "cuda" and ops.backend(model.model.norm.weight) == "triton" and model.vocab is None


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [rows, C], written by every replay
    reads: list[tuple[Tensor, Tensor]]  # the adapter's copies, kept alive


class Passes:
    """A model and a cache, whose last SPARE_BLOCKS blocks no sequence is given."""

    def __init__(self, model: Transformer, cache: KVCache, cfg: SamplerConfig) -> None:
        self.model, self.cache = model, cache
        self._graphs: dict[tuple[int, int, Hashable], _Graph] = {}
        is_graphed = cfg.cuda_graphs and can_capture(model)
        self._max_rows = min(padded_rows(cfg.max_num_seqs), MAX_ROWS) if is_graphed else 0
        width = -(-model.config.context_len // cfg.block_size)
        self._inputs = _spare_rows(cache, self._max_rows, width).to(model.device)
        self._padding = _spare_rows(cache, MOST_PADDING, width)
        self._stream = torch.cuda.Stream(model.device) if is_graphed else None  # to record on, not to run on

    def close(self) -> None:
        """Drop the graphs. The cache that they write to goes after them, with the last reference to it."""
        self._graphs.clear()

    def __call__(self, batch: PackedBatch, salts: Salts) -> Tensor:
        """Hidden states [T, C] of a batch on the host. They hold until the next call. `salts` are those of now."""
        if not self._is_graphed(batch):
            return self.model(batch.to(self.model.device), self.cache)
        assert batch.paged is not None
        rows, adapter = padded_rows(batch.num_tokens), batch.adapters[0][0] if batch.adapters else None
        context_len = 1 << (batch.paged.max_context_len - 1).bit_length()
        key = rows, ops.decode_splits(self.cache.k, rows, context_len), salts[adapter]
        self._copy_in(batch, rows)
        if key not in self._graphs:
            if not {salt for _, _, salt in self._graphs} <= set(salts.values()):
                self._graphs.clear()
            self._graphs[key] = self._record(_first(self._inputs, rows, context_len).with_adapter(adapter))
        graph, hidden, _ = self._graphs[key]
        graph.replay()
        return hidden[: batch.num_tokens]

    def _is_graphed(self, batch: PackedBatch) -> bool:
        """Whether each sequence has one token, all are seen through the same adapter or none, and they fit."""
        num_tokens = batch.num_tokens
        decodes = num_tokens == len(batch.seqlens) <= self._max_rows
        return decodes and (not batch.adapters or batch.adapters[0][1:] == (0, num_tokens))

    def _copy_in(self, batch: PackedBatch, rows: int) -> None:
        """Make the first `rows` inputs those of the batch, and padding."""
        padding = _first(self._padding, rows - batch.num_tokens, 0)
        assert batch.paged is not None and padding.paged is not None and self._inputs.paged is not None
        width = batch.paged.block_tables.shape[1]

        def put(inputs: Tensor, own: Tensor, behind: Tensor) -> None:
            # pinned memory of its own: the copy may still be under way when the next step is made
            inputs[:rows].copy_(torch.cat([own, behind]).pin_memory(), non_blocking=True)

        put(self._inputs.input_ids, batch.input_ids, padding.input_ids)
        put(self._inputs.positions, batch.positions, padding.positions)
        inputs, own, behind = self._inputs.paged, batch.paged, padding.paged
        put(inputs.slot_mapping, own.slot_mapping, behind.slot_mapping)
        put(inputs.block_tables[:, :width], own.block_tables, behind.block_tables[:, :width])
        put(inputs.context_lens, own.context_lens, behind.context_lens)

    def _record(self, batch: PackedBatch) -> _Graph:
        self.model(batch, self.cache)  # compiles kernels and casts the adapter, which a capture cannot
        adapter = self.model.adapters[batch.adapters[0][0]] if batch.adapters else None
        reads = [pair.cast(self.model.dtype) for pair in adapter.pairs.values()] if adapter else []
        pool = next((other.graph.pool() for other in self._graphs.values()), None)  # None: a new one
        graph = torch.cuda.CUDAGraph()
        try:
            # the stream outside, too: where a capture cannot be ended, torch.cuda.graph leaves it the current one
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool, self._stream):
                hidden = self.model(batch, self.cache)
        except BaseException:
            self._graphs.clear()
            graph.reset()  # now, not with the traceback: by then others may have been recorded
            raise
        return _Graph(graph, hidden, reads)


def _spare_rows(cache: KVCache, rows: int, width: int) -> PackedBatch:
    """The first tokens of a sequence in the spare block, one a row, with tables of `width` blocks, on the host."""
    _, num_blocks, block_size = cache.k.shape[:3]
    spare = num_blocks - SPARE_BLOCKS
    positions = torch.arange(rows) % block_size
    tables, context_lens = torch.full((rows, width), spare, dtype=torch.int32), (positions + 1).int()
    paged = PagedMeta(spare * block_size + positions, tables, context_lens, max_context_len=min(rows, block_size))
    starts = torch.arange(rows + 1, dtype=torch.int32)
    return PackedBatch(torch.zeros_like(positions), positions, starts, (1,) * rows, paged=paged)


def _first(batch: PackedBatch, rows: int, max_context_len: int) -> PackedBatch:
    """The first rows of a batch of one token a sequence: views of its tensors."""
    assert batch.paged is not None
    slots, tables = batch.paged.slot_mapping[:rows], batch.paged.block_tables[:rows]
    paged = PagedMeta(slots, tables, batch.paged.context_lens[:rows], max_context_len)
    ids, positions, starts = batch.input_ids[:rows], batch.positions[:rows], batch.cu_seqlens[: rows + 1]
    return PackedBatch(ids, positions, starts, batch.seqlens[:rows], paged=paged)
