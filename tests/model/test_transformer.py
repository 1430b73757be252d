"""Logits against transformers', on a small random model of every architecture, in fp32."""

import random

import pytest
import torch

from isheep.model.batch import PackedBatch
from isheep.model.config import ModelConfig
from isheep.model.transformer import KVCache, Transformer
from tests.paging import paged_batch, scattered_blocks
from tests.tiny import CONFIGS, config_json, tiny_model, transformers_twin

LENS = (1, 5, 33, 100, 16)  # the llama_31_rope model was "trained" on 64 positions


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A model, and the logits [n, V] that transformers gives for each of some sequences."""
    model = tiny_model(request.param)
    twin = transformers_twin(model, tmp_path_factory.mktemp(request.param), request.param)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(320, (n,), generator=generator).tolist() for n in LENS]
    with torch.no_grad():
        return model, sequences, [twin(torch.tensor([ids])).logits[0] for ids in sequences]


def assert_equal_logits(got, expected):
    """To 1e-4 of the range of the logits."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("grad", [False, True], ids=["scoring", "training"])
def test_packed(pair, backend, grad):
    model, sequences, expected = pair
    with torch.set_grad_enabled(grad):
        assert_equal_logits(model.logits(model(PackedBatch.pack(sequences, "cpu"))), torch.cat(expected))


@pytest.mark.parametrize("block_size", [16, 32])
def test_paged_in_random_chunks(pair, backend, block_size):
    """Decode and parts of prompts in one batch, blocks scattered, everything that was never written NaN."""
    model, sequences, expected = pair
    rng = random.Random(0)
    blocks = scattered_blocks(LENS, block_size, num_blocks=3 * sum(LENS))
    cache = poisoned_cache(model, 3 * sum(LENS), block_size)
    done, got = [0] * len(sequences), [[] for _ in sequences]
    while any(d < n for d, n in zip(done, LENS, strict=True)):
        sizes = [min(rng.choice((0, 1, 1, 5, 16, 23)), n - d) for d, n in zip(done, LENS, strict=True)]
        active = [s for s, size in enumerate(sizes) if size]
        rng.shuffle(active)
        if not active:
            continue
        chunks = [(sequences[s][done[s] : done[s] + sizes[s]], done[s]) for s in active]
        batch = paged_batch(chunks, [blocks[s] for s in active], block_size)
        with torch.inference_mode():
            logits = model.logits(model(batch, cache))
        for s, part in zip(active, logits.split([sizes[s] for s in active]), strict=True):
            got[s].append(part)
            done[s] += sizes[s]
    for parts, logits in zip(got, expected, strict=True):
        assert_equal_logits(torch.cat(parts), logits)


def poisoned_cache(model: Transformer, num_blocks: int, block_size: int) -> KVCache:
    """NaN in every slot: only what was written may be read."""
    cache = model.new_kv_cache(num_blocks, block_size)
    for tensor in (cache.k, cache.v):
        tensor.fill_(torch.nan)
    return cache


def test_copied_blocks_serve_as_the_originals(pair, backend):
    model, sequences, expected = pair
    ids = sequences[3]
    cache = model.new_kv_cache(num_blocks=20, block_size=16)
    first, copies = [1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]
    with torch.inference_mode():
        model(paged_batch([(ids[:99], 0)], [first], 16), cache)
        cache.copy_blocks(list(zip(first, copies, strict=True)))
        hidden = model(paged_batch([(ids[99:], 99)], [copies], 16), cache)
        assert_equal_logits(model.logits(hidden), expected[3][99:])


def test_prepacked_weights_give_the_same_logits():
    """bf16: the packed product is the same product, so only its order of summation may differ."""
    model = tiny_model("llama_gqa", dtype=torch.bfloat16)
    batch = PackedBatch.pack([[1, 2, 3, 4, 5]], "cpu")
    with torch.inference_mode():
        plain = model.logits(model(batch))
        model.prepack(rows=5)
        packed = model.logits(model(batch))
        model.unpack()
        assert torch.equal(model.logits(model(batch)), plain)
    assert (packed - plain).abs().max() <= 0.02 * (plain.max() - plain.min())


def test_block_bytes_are_what_a_cache_takes():
    model = tiny_model("qwen3_head_dim")
    cache = model.new_kv_cache(num_blocks=7, block_size=16)
    total = sum(t.numel() * t.element_size() for t in (cache.k, cache.v))
    assert total == 7 * KVCache.block_bytes(model.config, 16, torch.float32)


def test_a_sliding_window_ends_the_context():
    assert ModelConfig.from_dict(config_json("mistral", sliding_window=128)).context_len == 128
    assert ModelConfig.from_dict(config_json("qwen2_mha", sliding_window=128)).context_len == 512
    used = config_json("qwen2_mha", sliding_window=128, use_sliding_window=True)
    assert ModelConfig.from_dict(used).context_len == 128
