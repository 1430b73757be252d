"""Batches over a paged cache for tests, laid out as unkindly as the sampler may ever do it."""

import random
from collections.abc import Sequence
from itertools import accumulate

import torch

from isheep.model.batch import PackedBatch, PagedMeta


def scattered_blocks(context_lens: Sequence[int], block_size: int, num_blocks: int, seed: int = 0) -> list[list[int]]:
    """For each sequence blocks for its length, drawn at random from all over the cache. Block 0 stays free."""
    free = list(range(1, num_blocks))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in context_lens]


def paged_batch(
    chunks: Sequence[tuple[Sequence[int], int]], blocks: Sequence[Sequence[int]], block_size: int
) -> PackedBatch:
    """chunks: (token ids, first position) of each sequence in this batch; blocks: its block table.

    Places of a table that the sequence does not need yet point to block 0, which tests fill with NaN.
    """
    lens = tuple(len(ids) for ids, _ in chunks)
    positions = [p for ids, first in chunks for p in range(first, first + len(ids))]
    owners = [s for s, n in enumerate(lens) for _ in range(n)]
    slots = [blocks[s][p // block_size] * block_size + p % block_size for s, p in zip(owners, positions, strict=True)]
    context_lens = [first + len(ids) for ids, first in chunks]
    tables = torch.zeros(len(chunks), max(map(len, blocks)) + 1, dtype=torch.int32)
    for s, length in enumerate(context_lens):
        used = blocks[s][: -(-length // block_size)]
        tables[s, : len(used)] = torch.tensor(used)
    paged = PagedMeta(torch.tensor(slots), tables, torch.tensor(context_lens, dtype=torch.int32), max(context_lens))
    cu = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
    ids = torch.tensor([t for ids, _ in chunks for t in ids])
    return PackedBatch(ids, torch.tensor(positions), cu, lens, paged=paged)
