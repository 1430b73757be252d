"""Requests: every field is checked, and a completion is written as documented."""

import math

import pytest

from isheep.config import UserError
from isheep.sampler.request import Completion, Request, SamplingParams, Sequence

BAD_VALUES = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -1),
    ("top_k", 1.0),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("max_tokens", 0),
    ("max_tokens", None),
    ("min_tokens", -1),
    ("stop", ("",)),
    ("stop", (17,)),
    ("stop", None),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", ("17",)),
    ("ignore_eos", 1),
    ("seed", -1),
    ("seed", 2**63),
    ("logprobs", -1),
    ("logprobs", True),
    ("logprob_token_ids", (-1,)),
    ("num_prompt_logprobs", -1),
    ("pool", 1),
    ("allowed_token_ids", ()),
    ("allowed_token_ids", (3, -3)),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value_is_named_with_the_allowed_ones(name: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name} is {value!r}, but must be ")


def test_every_field_has_a_bad_value_above() -> None:
    assert {name for name, _ in BAD_VALUES} == set(SamplingParams.__dataclass_fields__)


def test_bounds_themselves_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=0, min_p=1, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(n=1, max_tokens=1, min_tokens=1, seed=2**63 - 1, logprobs=0, allowed_token_ids=(0,))


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(UserError, match="min_tokens is 9, but must be at most max_tokens, which is 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_lists_and_a_single_stop_string_become_tuples() -> None:
    params = SamplingParams(stop="17", stop_token_ids=[1], allowed_token_ids=[2, 3])
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids) == (("17",), (1,), (2, 3))
    assert SamplingParams(stop=["a", "b"]) == SamplingParams(stop=("a", "b"))
    hash(params)


def test_empty_prompt() -> None:
    with pytest.raises(UserError, match='request "r7" has no tokens'):
        Request("r7", ())


def test_sequence_counts_prompt_and_output() -> None:
    seq = Sequence(Request("r", [5, 6, 7]), sample=2, arrival=0)
    seq.token_ids += [8, 9]
    assert seq.key == ("r", 2)
    assert (seq.num_tokens, seq.num_prompt_tokens, seq.num_output_tokens, seq.output_token_ids) == (5, 3, 2, [8, 9])
    assert seq.request.prompt_token_ids == (5, 6, 7)


def test_completion_row() -> None:
    completion = Completion("r", 1, "hi", [8, 9], "stop", 3, 2)
    row = {
        "id": "r",
        "sample": 1,
        "text": "hi",
        "token_ids": [8, 9],
        "finish_reason": "stop",
        "num_prompt_tokens": 3,
        "num_cached_tokens": 2,
    }
    assert completion.to_json() == row
    logprobs = [{"token_id": 8, "logprob": -0.5, "top": [[8, -0.5]]}]
    completion = Completion("r", 1, "hi", [8, 9], "stop", 3, 2, logprobs)
    assert completion.to_json() == row | {"logprobs": logprobs}
