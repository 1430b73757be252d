"""Keys and values are written in chunks into a cache of NaN, then attended; the truth never saw a cache."""

from dataclasses import replace

import pytest
import torch

from isheep.model import ops
from isheep_kernels import cpu
from isheep_kernels.attention_packed import attention_packed
from isheep_kernels.attention_paged import (
    attention_paged,
    attention_paged_ref,
    choose_splits,
    write_kv_ref,
    write_kv_rope,
    write_kv_rope_ref,
)
from tests.kernels.fence import INTERPRETED, fenced, poisoned
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


# ---- Triton, in its interpreter ------------------------------------------------------------------------------------

# (query tokens, context): a sequence without tokens in the middle and at the end, block and tile edges
DECODE = [(1, 1), (1, 16), (0, 9), (1, 129), (1, 64), (1, 47), (0, 0)]
MIXED = [(1, 17), (0, 0), (5, 5), (1, 130), (22, 70), (0, 3)]
LAYOUTS = pytest.mark.parametrize(  # heads, kv_heads, head_dim, block_size
    "layout", [(2, 2, 64, 16), (3, 1, 80, 64), (6, 2, 96, 48), (4, 1, 128, 16), (1, 1, 256, 32)], ids=str
)


def filled_cache(chunks, layout, dtype):
    """q [T, H, D], the caches, NaN wherever no position of a sequence lies, and what finds its way in them."""
    heads, kv_heads, head_dim, block_size = layout
    lens = [length for _, length in chunks]
    num_blocks = 2 + 2 * sum(-(-n // block_size) for n in lens)
    blocks = scattered_blocks(lens, block_size, num_blocks)
    caches = [torch.full((num_blocks * block_size, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    tables = torch.zeros(len(lens), max(map(len, blocks)) + 1, dtype=torch.int32)
    for s, (n, table) in enumerate(zip(lens, blocks, strict=True)):
        tables[s, : len(table)] = torch.tensor(table, dtype=torch.int32)
        slots = [table[p // block_size] * block_size + p % block_size for p in range(n)]
        for i, cache in enumerate(caches):
            cache[slots] = randn(n, kv_heads, head_dim, seed=2 * s + i, dtype=dtype)
    k_cache, v_cache = (cache.view(num_blocks, block_size, kv_heads, head_dim) for cache in caches)
    queries = torch.tensor([0, *(n for n, _ in chunks)])
    return {
        "q": randn(sum(n for n, _ in chunks), heads, head_dim, seed=99, dtype=dtype),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cu_seqlens": queries.cumsum(0).int(),
        "context_lens": torch.tensor(lens, dtype=torch.int32),
        "block_tables": tables,
    }


def run(inputs, num_splits=None):
    longest = inputs["cu_seqlens"].diff().max().item(), inputs["context_lens"].max().item()
    with poisoned():
        inputs = {name: fenced(x) for name, x in inputs.items()}
        return attention_paged(*inputs.values(), *longest, inputs["q"].shape[2] ** -0.5, num_splits)


def run_ref(inputs, dtype):
    """`attention_paged_ref` of the same numbers in `dtype`."""
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return attention_paged_ref(*inputs.values(), inputs["q"].shape[2] ** -0.5)


@INTERPRETED
@LAYOUTS
@pytest.mark.parametrize("chunks", [DECODE, MIXED], ids=["decode", "mixed"])
def test_the_triton_kernel(chunks, layout, dtype):
    inputs = filled_cache(chunks, layout, dtype)
    assert_as_good_as(run(inputs), run_ref(inputs, dtype), run_ref(inputs, torch.float64))


@INTERPRETED
@pytest.mark.parametrize("num_splits", [2, 5])  # of five, some are empty, and some end before a query's first key
@pytest.mark.parametrize("chunks", [DECODE, MIXED, [(22, 70)]], ids=["decode", "mixed", "one sequence"])
def test_split_keys_are_joined(chunks, num_splits, dtype):
    inputs = filled_cache(chunks, (3, 1, 80, 16), dtype)
    assert_as_good_as(run(inputs, num_splits), run_ref(inputs, dtype), run_ref(inputs, torch.float64))


@INTERPRETED
def test_whole_prompts_give_what_packed_attention_gives(dtype):
    lens, layout = (1, 33, 70, 5), (4, 2, 64, 16)
    inputs = filled_cache([(n, n) for n in lens], layout, dtype)
    slots = [inputs["block_tables"][s, p // 16] * 16 + p % 16 for s, n in enumerate(lens) for p in range(n)]
    k, v = (inputs[name].flatten(0, 1)[slots] for name in ("k_cache", "v_cache"))
    packed = attention_packed(inputs["q"], k, v, inputs["cu_seqlens"], 0.125)
    for got in (packed, run(inputs)):
        assert_as_good_as(got, run_ref(inputs, dtype), run_ref(inputs, torch.float64))


@INTERPRETED
def test_a_decoded_token_gets_the_same_bytes_whatever_the_batch(dtype):
    inputs = filled_cache(DECODE, (3, 1, 64, 16), dtype)
    together, row = run(inputs), 0
    for s, (n, length) in enumerate(DECODE):
        alone = {name: inputs[name][s : s + 1] for name in ("context_lens", "block_tables")}
        alone |= {"q": inputs["q"][row : row + n], "cu_seqlens": torch.tensor([0, n], dtype=torch.int32)}
        if n:
            assert torch.equal(run(inputs | alone), together[row : row + n]), length
        row += n


@INTERPRETED
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 64), (20, 2, 80), (17, 17, 6)])
def test_the_triton_kernel_turns_and_writes(heads, kv_heads, head_dim, dtype):
    q, k, v = (randn(7, h, head_dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads)))
    angles = randn(7, head_dim // 2, seed=3) * 9
    slots = torch.tensor([3, 9, 33, 1, 0, 20, 47])

    def turned_and_written(write, q, k, v, *rest):
        caches = [torch.full((3, 16, kv_heads, head_dim), torch.nan, dtype=q.dtype) for _ in range(2)]
        turned = write(q, k, v, *rest, *caches)
        others = torch.ones(48, dtype=torch.bool).index_fill(0, slots, False)
        assert all(cache.flatten(0, 1)[others].isnan().all() for cache in caches)
        return turned, *(cache.flatten(0, 1)[slots] for cache in caches)

    inputs = (q, k, v, angles.cos(), angles.sin(), slots)
    with poisoned():
        got = turned_and_written(write_kv_rope, *map(fenced, inputs))
    ref = turned_and_written(write_kv_rope_ref, *inputs)
    truth = turned_and_written(write_kv_rope_ref, *(x.double() for x in inputs[:5]), slots)
    for triple in zip(got, ref, truth, strict=True):
        assert_as_good_as(*triple)


@pytest.mark.parametrize(
    ("programs", "max_context_len", "slots", "splits"),
    [
        (1000, 100_000, 264, 1),  # the chip is full
        (212, 100_000, 264, 1),  # as good as full
        (8, 200, 264, 1),  # too short to split
        (8, 1024, 264, 4),  # as many as the length allows
        (132, 100_000, 264, 2),  # exactly two to a slot
        (100, 100_000, 264, 5),  # 500 programs fill two waves to 95 %; 200 fill one to 76 %
        (1, 1_000_000, 264, 28),  # within 85 % of the 32 that the joining kernel takes
    ],
)
def test_choose_splits(programs, max_context_len, slots, splits):
    assert choose_splits(programs, max_context_len, slots) == splits


def test_shapes_and_dtypes_that_do_not_fit():
    inputs = filled_cache(DECODE, (3, 1, 64, 16), torch.float32)
    q = inputs["q"]
    for bad in [
        {"q": q.half()},
        {"q": q[:, :, :32]},
        {"k_cache": inputs["k_cache"][:1]},
        {"context_lens": inputs["context_lens"][:2]},
        {"block_tables": inputs["block_tables"].long()},
    ]:
        with pytest.raises(ValueError, match=r"q|int32"):
            run(inputs | bad)
    k, angles, slots = q[:, :1], torch.zeros(len(q), 32), torch.arange(len(q))
    with pytest.raises(ValueError, match="write_kv_rope"):
        write_kv_rope(q, k, k, angles[:, :31], angles, slots, inputs["k_cache"], inputs["v_cache"])
