"""Instances as Self-Instruct finds them: first the kind of each task, then an input and an output of it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from isheep.config import AnswerConfig
from isheep.sampler.request import Completion, Request
from isheep.stages import Iteration, read_sealed
from isheep.stages.answer import answer
from isheep.stages.instances import NUM_CLASSIFIED, NUM_WITH_INSTANCE, draw_shown
from isheep.text.seeds import load_seeds
from isheep.text.tokenizer import Tokenizer
from tests.scripted import (
    ScriptedSampler,
    Stopped,
    folder_bytes,
    iteration,
    sealed,
    seed_rows,
    stopping,
    tiny_tokenizer,
)

CFG = AnswerConfig(method="instances", temperature=0.0, max_tokens=300)
# instruction -> is it a classification, what the model says, and what comes of it
PLAYED = {
    "Name a tree.": ("no", " <noinput>\nOutput: Oak.", ("", "Oak.", None)),
    "Is it a plant?": (" Yes", " yes\nInput: an oak\nOutput: no\nInput: a cat", ("an oak", "yes", None)),
    "Sum up.": ("no", " rain\nOutput: rain\nInput: hail\nOutput: ice", ("hail", "ice", None)),
    "Sort it.": ("no", " b a\nOutput: as follows:", ("b a", "as follows:", "ends_with_colon")),
    "Guess a word.": ("maybe", " one\nOutput: a\nInput: one\nOutput: b", ("one", "a", "duplicate_input")),
    "Spell it.": ("no", " there is no other field", ("", "", "no_instance")),
}


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    rows = [{**row, "is_classification": i % 2 == 0} for i, row in enumerate(seed_rows(12))]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "seeds.jsonl"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


def written(it: Iteration) -> Iteration:
    rows = [{"id": f"{it.name}/0.{i}", "instruction": text, "input": "old"} for i, text in enumerate(PLAYED)]
    sealed(it.file("instructions.jsonl"), [{**row, "verdict": "kept", "reason": None} for row in rows])
    return it


def play(request: Request) -> str:
    """Of row i, by the request's id."""
    row_id, _, what = request.id.rpartition("/")
    kind, reply, _ = list(PLAYED.values())[int(row_id.rpartition(".")[2])]
    return kind if what == "class" else reply


def test_each_kind_is_asked_in_its_order_and_the_first_good_instance_is_taken(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer
) -> None:
    it, sampler = written(iteration(tmp_path)), ScriptedSampler(play, shuffle=2)
    answer(it, sampler.stream, tokenizer, seeds, CFG)
    rows = read_sealed(it.file("answers.jsonl"))
    assert [(row["input"], row["output"], row["reason"]) for row in rows] == [found for *_, found in PLAYED.values()]
    assert [row["is_classification"] for row in rows] == [False, True, False, False, False, False]
    assert [row["reply"] for row in read_sealed(it.file("classes.jsonl"))] == [kind for kind, *_ in PLAYED.values()]
    prompts = {request.id: tokenizer.decode(list(request.prompt_token_ids)) for request in sampler.seen}
    assert prompts["iter1/0.1/answer"].endswith("Task: Is it a plant?\nOutput:")
    assert prompts["iter1/0.0/answer"].endswith("Task: Name a tree.\nInput:")
    assert prompts["iter1/0.0/class"].endswith("Task: Name a tree.\nClassification:")
    of_class = {request.params.temperature for request in sampler.seen if request.id.endswith("class")}
    assert of_class == {0.0} and all("old" not in prompt for prompt in prompts.values())


def test_what_is_cut_is_no_instance(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    it, whole = written(iteration(tmp_path)), ScriptedSampler(play)

    def cut(requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in whole.stream(requests):
            yield replace(completion, finish_reason="length")

    answer(it, cut, tokenizer, seeds, CFG)
    found = {row["instruction"]: (row["input"], row["output"]) for row in read_sealed(it.file("answers.jsonl"))}
    assert found["Name a tree."] == ("", "") and found["Is it a plant?"] == ("an oak", "yes")
    assert found["Sum up."] == ("rain", "rain")


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    it = written(iteration(tmp_path / "whole"))
    answer(it, ScriptedSampler(play).stream, tokenizer, seeds, CFG)
    whole = folder_bytes(it.folder)
    for after in range(2 * len(PLAYED)):
        again, rest = written(iteration(tmp_path / f"stopped{after}")), ScriptedSampler(play)
        with pytest.raises(Stopped):
            answer(again, stopping(ScriptedSampler(play, shuffle=after), after), tokenizer, seeds, CFG)
        answer(again, rest.stream, tokenizer, seeds, CFG)
        assert len(rest.seen) == 2 * len(PLAYED) - after
        assert folder_bytes(again.folder) == whole


def test_an_instruction_longer_than_the_context_is_dropped(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    it = iteration(tmp_path, context_len=2048)
    row = {"id": "iter1/0.0", "instruction": "word " * 2000, "input": "", "verdict": "kept", "reason": None}
    sealed(it.file("instructions.jsonl"), [row])
    answer(it, ScriptedSampler(play).stream, tokenizer, seeds, CFG)
    assert [row["reason"] for row in read_sealed(it.file("answers.jsonl"))] == ["exceeds_context"]
    assert [row["reply"] for row in read_sealed(it.file("classes.jsonl"))] == [None]


def test_what_is_shown_follows_from_the_key(seeds: Path) -> None:
    tasks, _ = load_seeds(seeds)
    shown = draw_shown(tasks, "a")
    assert shown == draw_shown(tasks, "a") != draw_shown(tasks, "b")
    assert len(shown.classified) == 12 <= 2 * NUM_CLASSIFIED
    for kind, some in shown.with_instance.items():
        assert len(some) == NUM_WITH_INSTANCE and {task.is_classification for task in some} == {kind}
    others = [task for task in tasks if not task.is_classification]
    assert {task.is_classification for task in draw_shown(others, "a").with_instance[True]} == {False}
