"""Quality is asked of all pairs, following of those that pass; a score is read or it is null."""

from pathlib import Path

import pytest

from isheep.config import AssessConfig
from isheep.sampler.request import Request
from isheep.stages import Iteration, read_sealed
from isheep.stages.assess import assess
from isheep.text.tokenizer import Tokenizer
from tests.scripted import ScriptedSampler, Stopped, folder_bytes, iteration, sealed, stopping, tiny_tokenizer, words

REPLIES = {
    "iter1/0.0/quality": "9||Clear.",
    "iter1/0.0/following": " 10||Yes",
    "iter1/0.1/quality": "8||Fine.",
    "iter1/0.2/quality": "I cannot say.",
    "iter1/0.3/quality": "10",
    "iter1/0.3/following": "7||Partly",
}
SCORES = [
    {"id": "iter1/0.0", "quality_score": 9, "following_score": 10},
    {"id": "iter1/0.1", "quality_score": 8, "following_score": None},
    {"id": "iter1/0.2", "quality_score": None, "following_score": None},
    {"id": "iter1/0.3", "quality_score": 10, "following_score": 7},
]


def play(request: Request) -> str:
    return REPLIES[request.id]


def written(it: Iteration) -> Iteration:
    """Four pairs that passed the rules, and one that did not."""
    pairs = [
        {"id": f"iter1/0.{i}", "instruction": words(f"i{i}", 6), "input": "", "output": words(f"o{i}", 9)}
        for i in range(5)
    ]
    sealed(
        it.file("answers.jsonl"), [pair | {"verdict": "kept" if i < 4 else "dropped"} for i, pair in enumerate(pairs)]
    )
    return it


@pytest.fixture
def it(tmp_path: Path) -> Iteration:
    return written(iteration(tmp_path))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


def test_following_is_asked_of_those_whose_quality_is_above_the_threshold(it: Iteration, tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler(play, shuffle=1)
    assess(it, sampler.stream, tokenizer, 8.0, AssessConfig())
    assert read_sealed(it.file("scores.jsonl")) == SCORES
    asked = [row["id"] + "/" + row["question"] for row in read_sealed(it.file("replies.jsonl"))]
    assert asked == [f"iter1/0.{i}/quality" for i in range(4)] + ["iter1/0.0/following", "iter1/0.3/following"]
    assert {request.id for request in sampler.seen} == REPLIES.keys()


def test_a_lower_threshold_asks_more(it: Iteration, tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler(lambda request: REPLIES.get(request.id, "5||"))
    assess(it, sampler.stream, tokenizer, 7.0, AssessConfig())
    assert read_sealed(it.file("scores.jsonl"))[1] == {"id": "iter1/0.1", "quality_score": 8, "following_score": 5}


@pytest.mark.parametrize(("assessor", "adapter"), [("current", "iter1"), ("base", None)])
def test_the_assessor_is_the_current_or_the_base_model(
    tmp_path: Path, tokenizer: Tokenizer, assessor: str, adapter: str | None
) -> None:
    sampler = ScriptedSampler(play)
    assess(
        written(iteration(tmp_path, adapter="iter1")), sampler.stream, tokenizer, 8.0, AssessConfig(assessor=assessor)
    )
    assert {request.adapter for request in sampler.seen} == {adapter}


def test_stopped_anywhere_it_asks_only_what_is_left(tmp_path: Path, it: Iteration, tokenizer: Tokenizer) -> None:
    assess(it, ScriptedSampler(play).stream, tokenizer, 8.0, AssessConfig())
    whole = folder_bytes(it.folder)
    for after in range(len(REPLIES)):
        again = written(iteration(tmp_path / f"stopped{after}"))
        with pytest.raises(Stopped):
            assess(again, stopping(ScriptedSampler(play, shuffle=after), after), tokenizer, 8.0, AssessConfig())
        rest = ScriptedSampler(play)
        assess(again, rest.stream, tokenizer, 8.0, AssessConfig())
        assert len(rest.seen) == len(REPLIES) - after
        assert folder_bytes(again.folder) == whole


def test_a_pair_beyond_the_context_has_no_score(tmp_path: Path, tokenizer: Tokenizer) -> None:
    it = iteration(tmp_path, context_len=600)
    pair = {"id": "iter1/0.0", "instruction": "Go on.", "input": "", "output": words("o", 600), "verdict": "kept"}
    sealed(it.file("answers.jsonl"), [pair])
    assess(it, ScriptedSampler(play).stream, tokenizer, 8.0, AssessConfig())
    assert read_sealed(it.file("scores.jsonl")) == [{"id": "iter1/0.0", "quality_score": None, "following_score": None}]
