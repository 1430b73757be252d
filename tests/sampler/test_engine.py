"""The sampler against a cache-free twin, against itself under every batching, and its finish rules and parameters."""

import dataclasses
import random

import pytest
import torch

from isheep.config import SamplerConfig, UserError
from isheep.model.batch import PackedBatch
from isheep.model.lora import LoRAConfig, attach
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.text.tokenizer import load_tokenizer
from tests.tiny import tiny_model
from tests.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    model = tiny_model("llama_gqa")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        for parameter in attach(model, LoRAConfig(), name).parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def make_requests(num: int = 64, **fixed) -> list[Request]:
    """Mixed lengths, temperatures, truncations, sample counts and adapters; every third shares a prefix."""
    rng = random.Random(0)
    shared = [rng.randrange(300) for _ in range(40)]
    requests = []
    for i in range(num):
        prompt = (shared if i % 3 == 0 else []) + [rng.randrange(300) for _ in range(rng.randint(1, 60))]
        values = {
            "temperature": rng.choice([0, 0, 0.7, 1.0]),
            "top_p": rng.choice([1.0, 0.95, 0.5]),
            "top_k": rng.choice([0, 0, 20]),
            "n": rng.choice([1, 1, 1, 3]),
            "max_tokens": rng.randint(1, 80),
            "ignore_eos": True,
            "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
        }
        params = SamplingParams(**{**values, **fixed})
        requests.append(Request(f"r{i}", tuple(prompt), params, rng.choice([None, None, "one", "two"])))
    return requests


def outputs(completions: list[Completion]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(c.id, c.sample): tuple(c.token_ids) for c in completions}


def greedy_twin(model, request: Request) -> tuple[int, ...]:
    """The same continuation without any cache: the whole sequence again for each token."""
    ids = list(request.prompt_token_ids)
    for _ in range(request.params.max_tokens):
        with torch.no_grad():
            logits = model.logits(model(PackedBatch.pack([ids], "cpu", request.adapter))[-1:])
        ids.append(int(logits.argmax()))
    return tuple(ids[len(request.prompt_token_ids) :])


def test_greedy_equals_the_cache_free_twin(model, tokenizer):
    requests = make_requests(24, temperature=0, n=1, repetition_penalty=1.0)
    for completion, request in zip(Sampler(model, tokenizer).generate(requests), requests, strict=True):
        assert tuple(completion.token_ids) == greedy_twin(model, request), request.id


@pytest.mark.parametrize(
    "cfg",
    [
        SamplerConfig(max_num_seqs=1, max_num_batched_tokens=16),
        SamplerConfig(max_num_seqs=7, max_num_batched_tokens=50, prefix_caching=False),
        SamplerConfig(max_num_seqs=64, kv_cache_gib=0.0002),  # preempts
    ],
    ids=["one at a time", "chunked prefill, no prefix cache", "tiny cache"],
)
def test_texts_do_not_depend_on_batch_size_order_or_memory(model, tokenizer, cfg):
    requests = make_requests()
    expected = outputs(Sampler(model, tokenizer).generate(requests))
    sampler = Sampler(model, tokenizer, cfg)
    random.Random(1).shuffle(requests)
    assert outputs(sampler.generate(requests)) == expected
    sampler.scheduler.check_integrity()
    if cfg.kv_cache_gib:
        assert sampler.stats.num_preempted > 0


def test_seeds_and_samples_draw_differently(model, tokenizer):
    def draw(sampler_seed: int = 0, seed: int | None = None) -> dict:
        request = Request("a", (1, 2, 3), SamplingParams(n=2, max_tokens=20, ignore_eos=True, seed=seed))
        return outputs(Sampler(model, tokenizer, seed=sampler_seed).generate([request]))

    base = draw()
    assert base == draw() and base[("a", 0)] != base[("a", 1)]
    assert draw(sampler_seed=1) != base and draw(seed=1) != base
    assert draw(sampler_seed=1, seed=5) == draw(sampler_seed=2, seed=5)


def test_a_changed_adapter_never_meets_stale_blocks(model, tokenizer):
    request = Request("a", tuple(range(100)), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), "one")
    sampler = Sampler(model, tokenizer)
    first = sampler.generate([request])[0]
    again = sampler.generate([request])[0]
    assert again.num_cached_tokens == 96 and again.token_ids == first.token_ids
    pair = next(iter(model.adapters["one"].pairs.values()))
    with torch.no_grad():
        pair.lora_B.mul_(-3)
    changed = sampler.generate([request])[0]
    assert changed.num_cached_tokens == 0
    assert tuple(changed.token_ids) == greedy_twin(model, request) != tuple(first.token_ids)


def test_samples_share_the_prompt(model, tokenizer):
    sampler = Sampler(model, tokenizer, SamplerConfig(prefix_caching=False))
    done = sampler.generate([Request("a", tuple(range(90)), SamplingParams(n=4, max_tokens=5, ignore_eos=True))])
    assert [c.num_cached_tokens for c in done] == [0, 89, 89, 89]
    assert sampler.stats.num_prefill_tokens == 90 + 3  # the others compute the last prompt token again, for its logits


def test_stop_string_token_and_eos(model, tokenizer):
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    sampler = Sampler(model, tokenizer)
    whole = sampler.generate([Request("free", (5, 6, 7), free)])[0]
    assert whole.finish_reason == "length" and len(whole.token_ids) == 30
    ids = whole.token_ids
    stop_text = tokenizer.decode(ids[10:13])
    cut = sampler.generate([Request("text", (5, 6, 7), dataclasses.replace(free, stop=(stop_text,)))])[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop_text)]
    assert cut.token_ids == ids[: len(cut.token_ids)]
    token = ids[8]
    at = ids.index(token)
    by_id = sampler.generate([Request("id", (5, 6, 7), dataclasses.replace(free, stop_token_ids=(token,)))])[0]
    assert by_id.token_ids == ids[: at + 1] and by_id.text == tokenizer.decode(ids[:at])
    late = dataclasses.replace(free, stop_token_ids=(token,), min_tokens=at + 5)
    kept_out = sampler.generate([Request("late", (5, 6, 7), late)])[0]
    assert token not in kept_out.token_ids[: at + 4] and len(kept_out.token_ids) >= at + 5
    ends = Sampler(model, tokenizer, eos_token_ids=[token])
    by_eos = ends.generate([Request("eos", (5, 6, 7), dataclasses.replace(free, ignore_eos=False))])[0]
    assert by_eos.token_ids == ids[: at + 1] and by_eos.finish_reason == "stop"


def test_logprobs_are_the_models_own(model, tokenizer):
    params = SamplingParams(temperature=0.5, top_k=3, presence_penalty=0.5, max_tokens=6, logprobs=4, ignore_eos=True)
    done = Sampler(model, tokenizer).generate([Request("a", (9, 8, 7), params)])[0]
    ids = [9, 8, 7, *done.token_ids]
    with torch.no_grad():
        logprobs = model.logits(model(PackedBatch.pack([ids], "cpu"))).float().log_softmax(-1)
    for i, entry in enumerate(done.logprobs):
        row = logprobs[2 + i]
        assert entry["token_id"] == done.token_ids[i]
        assert entry["logprob"] == pytest.approx(row[entry["token_id"]].item(), abs=1e-4)
        top = row.topk(4)
        assert [t for t, _ in entry["top"]] == top.indices.tolist()
        assert [v for _, v in entry["top"]] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_allowed_tokens_and_penalties(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    only = SamplingParams(max_tokens=20, allowed_token_ids=(10, 20, 30), ignore_eos=True)
    assert set(sampler.generate([Request("only", (1,), only)])[0].token_ids) <= {10, 20, 30}
    strong = SamplingParams(temperature=0, max_tokens=40, presence_penalty=2, frequency_penalty=2, ignore_eos=True)
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    varied, repeated = (len(set(sampler.generate([Request("p", (1,), p)])[0].token_ids)) for p in (strong, plain))
    assert varied > repeated


def test_closing_the_stream_aborts_the_rest(model, tokenizer):
    sampler = Sampler(model, tokenizer)
    pulled = []

    def source():
        for request in make_requests(500, n=1):
            pulled.append(request.id)
            yield request

    stream = sampler.stream(source())
    next(stream)
    stream.close()
    assert len(pulled) < 200, "requests are pulled as there is room"
    assert not sampler.scheduler.has_work
    sampler.scheduler.check_integrity()
    assert len(sampler.generate(make_requests(3, n=1))) == 3


def test_context_ends_a_sample(model, tokenizer):
    limit = model.config.context_len
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    done = Sampler(model, tokenizer).generate([Request("long", (1,) * (limit - 10), params)])[0]
    assert len(done.token_ids) == 10 and done.finish_reason == "length"
    with pytest.raises(UserError, match="context"):
        Sampler(model, tokenizer).generate([Request("too long", (1,) * limit, params)])


def test_unknown_adapter_or_token_and_no_memory(model, tokenizer):
    with pytest.raises(UserError, match="the token 320, but the model's ids end at 319"):
        Sampler(model, tokenizer).generate([Request("a", (1,), SamplingParams(allowed_token_ids=(3, 320)))])
    with pytest.raises(UserError, match=r'"three".*one'):
        Sampler(model, tokenizer).generate([Request("a", (1,), SamplingParams(), "three")])
    with pytest.raises(UserError, match="kv_cache_gib"):
        Sampler(model, tokenizer, SamplerConfig(kv_cache_gib=1e-9))


def test_the_base_is_left_as_it_was_found(tokenizer):
    model = tiny_model("llama_gqa", dtype=torch.bfloat16)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    sampler = Sampler(model, tokenizer)
    sampler.generate([Request("a", (1, 2), SamplingParams(max_tokens=4))])
    sampler.close()
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
    assert all(module.packed is None for module in model.modules() if hasattr(module, "packed"))
