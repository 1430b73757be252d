"""What the sampler tells of a prompt and of its hidden states is what one plain pass over all the tokens gives."""

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

ASKED = (5, 300, 0)


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen2_gqa_tied")
    generator = torch.Generator().manual_seed(0)
    for parameter in attach(model, LoRAConfig(), "one").parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def make_requests(num: int = 24) -> list[Request]:
    """Half of them begin alike; numbers of log-probabilities from none to more than the prompt has."""
    rng = random.Random(0)
    shared = [rng.randrange(300) for _ in range(50)]
    requests = []
    for i in range(num):
        prompt = (shared if i % 2 else []) + [rng.randrange(300) for _ in range(rng.randint(1, 60))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 80), ignore_eos=True, logprobs=0, logprob_token_ids=ASKED,
            num_prompt_logprobs=rng.choice([0, 1, 2, 30, 200]), pool=rng.random() < 0.5,
        )  # fmt: skip
        requests.append(Request(f"r{i}", tuple(prompt), params, rng.choice([None, "one"])))
    return requests


@torch.no_grad()
def truth(model, request: Request, completion: Completion):
    """Log-probabilities [N-1, V] after each token but the last, and hidden states [N-1, C], of one plain pass."""
    ids = [*request.prompt_token_ids, *completion.token_ids]
    hidden = model(PackedBatch.pack([ids[:-1]], "cpu", request.adapter))
    return model.logits(hidden).float().log_softmax(-1), hidden


@pytest.mark.parametrize(
    ("cfg", "num_blocks"),
    [
        (SamplerConfig(), None),
        (SamplerConfig(max_num_seqs=3, max_num_batched_tokens=17), None),
        (SamplerConfig(prefix_caching=False), None),
        (SamplerConfig(), 16),
    ],
    ids=["default", "chunks of 17", "no cache", "preempting"],
)
def test_it_is_what_a_plain_pass_gives(model, tokenizer, cfg, num_blocks):
    requests, sampler = make_requests(), Sampler(model, tokenizer, cfg, num_blocks=num_blocks)
    completions = sampler.generate(requests)
    assert (sampler.stats.num_preempted > 0) == (num_blocks is not None)
    for request, completion in zip(requests, completions, strict=True):
        logprobs, hidden = truth(model, request, completion)
        num_prompt, params = len(request.prompt_token_ids), request.params
        n = min(params.num_prompt_logprobs, num_prompt - 1)
        entries = [*(completion.prompt_logprobs or []), *completion.logprobs]
        assert len(entries) == n + len(completion.token_ids), request.id
        ids = [*request.prompt_token_ids, *completion.token_ids][num_prompt - n :]
        for entry, row, token in zip(entries, logprobs[num_prompt - n - 1 :], ids, strict=True):
            assert entry["token_id"] == token
            torch.testing.assert_close(torch.tensor(entry["logprob"]), row[token], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.tensor(entry["asked"]), row[list(ASKED)], rtol=1e-4, atol=1e-4)
        if params.pool:
            torch.testing.assert_close(
                completion.vectors, torch.stack([hidden.mean(0), hidden[-1]]), rtol=1e-4, atol=1e-4
            )
        else:
            assert completion.vectors is None


def test_only_what_is_asked_for_is_kept_out_of_the_cache(model, tokenizer):
    prompt = tuple(random.Random(1).randrange(300) for _ in range(100))

    def cached(**asked) -> int:
        sampler = Sampler(model, tokenizer)
        for name in ("first", "second"):
            (completion,) = sampler.generate([Request(name, prompt, SamplingParams(max_tokens=1, **asked))])
        return completion.num_cached_tokens

    assert cached() == 96
    assert cached(num_prompt_logprobs=3) == 96  # the state of token 96 predicts token 97
    assert cached(num_prompt_logprobs=4) == 80
    assert cached(num_prompt_logprobs=1000) == cached(pool=True) == 0


def test_a_stopped_stream_leaves_room_for_the_next(model, tokenizer):
    sampler = Sampler(model, tokenizer, SamplerConfig(max_num_seqs=2))
    params = SamplingParams(max_tokens=5, pool=True, ignore_eos=True)
    for _ in range(3):
        stream = sampler.stream(Request(f"{i}", (1, 2, 3 + i), params) for i in range(4))
        next(stream)
        stream.close()
    assert len(sampler.generate([Request("last", (1, 2), params)])) == 1


def test_bad_requests_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="n is 2"):
        SamplingParams(n=2, pool=True)
    with pytest.raises(UserError, match="names the token 320"):
        Sampler(model, tokenizer).generate([Request("a", (1,), SamplingParams(logprob_token_ids=(320,)))])
