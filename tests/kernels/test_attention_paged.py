"""Keys and values are written in chunks into a cache of NaN, then attended; the truth never saw a cache."""

from dataclasses import replace

import pytest
import torch

from isheep.model import ops
from isheep_kernels import cpu
from isheep_kernels.attention_paged import attention_paged_ref, write_kv_ref
from tests.kernels.yardstick import DTYPES, assert_as_good_as, needs_compiler, randn
from tests.paging import paged_batch, scattered_blocks

# (query tokens, context) of each sequence: decode, whole prompts, later chunks, block and tile edges
CHUNKS = [(1, 1), (1, 2), (1, 16), (1, 17), (1, 63), (1, 65), (1, 129), (5, 5), (33, 33), (67, 67), (7, 70), (40, 131)]
HEADS = {"mha": (3, 3), "gqa3": (9, 3), "gqa7": (7, 1)}


def problem(heads, head_dim, block_size, dtype, chunks=CHUNKS):
    """q [T, H, D], each sequence's whole k and v [length, G, D], its batch. Keys are large: attention is peaked."""
    H, G = HEADS[heads]
    lens = [length for _, length in chunks]
    blocks = scattered_blocks(lens, block_size, 2 + sum(-(-n // block_size) for n in lens) * 2)
    batch = paged_batch([([0] * n, length - n) for n, length in chunks], blocks, block_size)
    q = randn(batch.num_tokens, H, head_dim, seed=0, dtype=dtype)
    k = [randn(n, G, head_dim, seed=10 + i, dtype=dtype) * 1.5 for i, n in enumerate(lens)]
    v = [randn(n, G, head_dim, seed=90 + i, dtype=dtype) for i, n in enumerate(lens)]
    return q, k, v, batch, blocks


def cached(k, v, blocks, block_size, write, like):
    """The cache after all keys and values went in, position by position out of order. Blocks not written hold NaN."""
    num_blocks = 2 + sum(map(len, blocks)) * 2
    shapes = ops.kv_cache_shapes(like, num_blocks, block_size, *like.shape[1:])
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=like.dtype) for shape in shapes)
    for table in blocks:  # the system's caches start at zero: unused slots of a block in use are never NaN
        k_cache[table], v_cache[table] = 0.0, 0.0
    batch = paged_batch([([0] * len(x), 0) for x in k], blocks, block_size)
    order = torch.randperm(batch.num_tokens, generator=torch.Generator().manual_seed(3))
    batch = replace(batch, paged=replace(batch.paged, slot_mapping=batch.paged.slot_mapping[order]))
    write(torch.cat(k)[order], torch.cat(v)[order], batch, k_cache, v_cache)
    return k_cache, v_cache


def write_ref(k, v, batch, k_cache, v_cache):
    write_kv_ref(k, v, batch.paged.slot_mapping, k_cache, v_cache)


def attend_ref(q, k_cache, v_cache, batch, scale):
    paged = batch.paged
    return attention_paged_ref(q, k_cache, v_cache, batch.cu_seqlens, paged.context_lens, paged.block_tables, scale)


def truth_of(q, k, v, chunks, scale):
    """Plain causal attention in fp64, one sequence and one head at a time."""
    out, start = [], 0
    for (n, length), ks, vs in zip(chunks, k, v, strict=True):
        group = q.shape[1] // ks.shape[1]
        ks, vs = (x.double().repeat_interleave(group, dim=1) for x in (ks, vs))
        scores = torch.einsum("thd,jhd->htj", q[start : start + n].double(), ks) * scale
        sees = torch.arange(length) <= torch.arange(length - n, length)[:, None]
        out.append(torch.einsum("htj,jhd->thd", scores.masked_fill(~sees, -torch.inf).softmax(-1), vs))
        start += n
    return torch.cat(out)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", HEADS)
def test_decode_prefill_and_chunks_in_one_batch(heads, head_dim, block_size, dtype, monkeypatch):
    q, k, v, batch, blocks = problem(heads, head_dim, block_size, dtype)
    scale = head_dim**-0.5
    got = ops.attention_paged(q, *cached(k, v, blocks, block_size, ops.write_kv, k[0]), batch, scale)
    truth = truth_of(q, k, v, CHUNKS, scale)
    monkeypatch.setattr(cpu, "serves", lambda x: False)
    ref = attend_ref(q, *cached(k, v, blocks, block_size, write_ref, k[0]), batch, scale)
    assert_as_good_as(got, ref, truth)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("block_size", [48, 64])
def test_other_block_sizes(block_size, dtype, monkeypatch):
    q, k, v, batch, blocks = problem("gqa3", 16, block_size, dtype)
    got = ops.attention_paged(q, *cached(k, v, blocks, block_size, ops.write_kv, k[0]), batch, 0.25)
    truth = truth_of(q, k, v, CHUNKS, 0.25)
    monkeypatch.setattr(cpu, "serves", lambda x: False)
    assert_as_good_as(got, attend_ref(q, *cached(k, v, blocks, block_size, write_ref, k[0]), batch, 0.25), truth)


@needs_compiler
@DTYPES
def test_a_token_gets_the_same_bytes_whatever_the_batch(dtype):
    """What batch invariance of the sampler stands on."""
    q, k, v, batch, blocks = problem("gqa3", 64, 16, dtype)
    cache = cached(k, v, blocks, 16, ops.write_kv, k[0])
    together = ops.attention_paged(q, *cache, batch, 0.125)
    start = 0
    for (n, length), table in zip(CHUNKS, blocks, strict=True):
        for i in range(n):  # token by token, as decoding would have met it
            alone = paged_batch([([0], length - n + i)], [table], 16)
            y = ops.attention_paged(q[start + i : start + i + 1], *cache, alone, 0.125)
            assert torch.equal(y[0], together[start + i])
        start += n


def test_definition_against_plain_attention():
    q, k, v, batch, blocks = problem("gqa3", 16, 16, torch.float32)
    k, v = [x.double() for x in k], [x.double() for x in v]
    cache = cached(k, v, blocks, 16, write_ref, k[0])  # fp64: torch's layout, torch's definition
    got = attend_ref(q.double(), *cache, batch, 0.25)
    assert torch.allclose(got, truth_of(q, k, v, CHUNKS, 0.25), atol=1e-12)
