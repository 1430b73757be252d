"""Each baseline as a command: the whole loop on a tiny model whose texts are a script, stopped and gone on with."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from isheep import run
from isheep.config import BASELINES, UserError
from isheep.sampler.request import Request
from isheep.session import Session
from isheep.stages import kept, read_sealed
from isheep.text.principles import NEXT_QUESTION
from isheep.text.self_instruct import NEXT_TASK
from isheep.text.topics import QUESTION_STOP, TOPICS_STOP
from tests.parrot import write_parrot
from tests.scripted import ScriptedSampler, Stopped, script, seed_rows, stopping, words
from tools.kill_demo import digests

CONFIG = """
dtype = "float32"
[instruct]
data_size = 12
[measure]
batch_tokens = 512
[train]
r = 2
batch_size = 4
warmup_steps = 1
"""
VERBOSE, TOPICS = ("--set", "answer.verbose=true"), ("--set", "instruct.method=topics")
RUNS = [(name, ()) for name in BASELINES] + [("dromedary", VERBOSE), ("dromedary", TOPICS)]


def listed(key: str) -> str:
    """Three instructions, with which a list of eight goes on."""
    first, *rest = [f"Describe {words(f'{key} {j}', 9)}." for j in range(3)]
    return f" {first}" + "".join(f"\n{n}. {text}" for n, text in enumerate(rest, 10))


def plays(request: Request) -> str:
    """What a model would say that knows each baseline's formats, which a request's stops tell apart."""
    kind, said, stop = request.id.rpartition("/")[2], words(request.id, 12), request.params.stop
    if kind == "class":
        return random.Random(request.id).choice([" yes", " no"])
    if stop == TOPICS_STOP:
        return f" {words(request.id, 2)}\n2. {words(f'{request.id} b', 2)}"
    if stop == QUESTION_STOP:
        return f" Tell me of {said}?"
    if stop == ("\n16.",):
        return listed(request.id)
    if stop == (NEXT_TASK,):
        return f" {said}\nOutput: {said[::-1]}\nInput: {said[::-2]}"
    if stop == (NEXT_QUESTION,):
        return f"Thoughts: rule 2, informative.\nAnswer: {said}" if random.Random(request.id).random() < 0.8 else said
    return script(request)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a long context, a configuration and seed tasks of both kinds."""
    folder = tmp_path_factory.mktemp("given")
    config = write_parrot(folder / "parrot") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 16384}))
    (folder / "small.toml").write_text(CONFIG)
    rows = [{**row, "is_classification": i % 3 == 0} for i, row in enumerate(seed_rows(12))]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Scripted:
    """Runs the command with a script for a sampler; `after` completions it is stopped. `asked` is what was sampled."""

    def __init__(self, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given, self.monkeypatch = given, monkeypatch
        self.play, self.asked = plays, list[Request]()

    def __call__(self, out: Path, *flags: str, after: int | None = None, shuffle: int = 0) -> None:
        self.asked = []
        sampler = ScriptedSampler(self._noted, shuffle=shuffle)
        stream = sampler.stream if after is None else stopping(sampler, after)
        self.monkeypatch.setattr(Session, "_sample", lambda _, requests: stream(requests))
        given = self.given
        files = ["--model", given / "parrot", "--config", given / "small.toml", "--seeds", given / "seeds.jsonl"]
        line = ["isheep.run", *files, "--device", "cpu", "--out", out, *flags]
        self.monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        assert run.main() in (None, 0)

    def _noted(self, request: Request) -> str:
        self.asked.append(request)
        return self.play(request)


@pytest.fixture
def scripted(given: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(given, monkeypatch)


@pytest.mark.parametrize(("baseline", "more"), RUNS)
def test_it_runs_and_goes_on_wherever_it_was_stopped(
    scripted: Scripted, tmp_path: Path, baseline: str, more: tuple[str, ...]
) -> None:
    flags = ("--baseline", baseline, *more)
    scripted(tmp_path / "whole", *flags)
    whole, num_sampled = digests(tmp_path / "whole"), len(scripted.asked)
    for i, share in enumerate((0.2, 0.5, 0.8)):
        out = tmp_path / f"stopped{i}"
        with pytest.raises(Stopped):
            scripted(out, *flags, after=int(share * num_sampled), shuffle=i)
        scripted(out, *flags, shuffle=9)
        assert digests(out) == whole
    assert (tmp_path / "whole/iter2").exists() == (more == VERBOSE)


def test_self_instruct_keeps_what_the_rules_keep(scripted: Scripted, tmp_path: Path) -> None:
    scripted(tmp_path / "run", "--baseline", "self_instruct")
    folder = tmp_path / "run/iter1"
    assert not (folder / "scores.jsonl").exists()
    assert len(data(folder)) == len(kept(read_sealed(folder / "answers.jsonl"))) == 12


def test_self_instruct_of_2022_trains_on_inputs_that_came_with_the_outputs(scripted: Scripted, tmp_path: Path) -> None:
    scripted(tmp_path / "run", "--baseline", "self_instruct_2022")
    folder = tmp_path / "run/iter1"
    shown = [row["examples"] for row in read_sealed(folder / "completions.jsonl")]
    assert {len(ids) for ids in shown} == {8}
    found = {row["instruction"]: row for row in read_sealed(folder / "answers.jsonl")}
    assert {row["is_classification"] for row in found.values()} == {True, False}
    assert all(row["input"] == found[row["instruction"]]["input"] != "" for row in data(folder))


def test_dromedary_trains_on_answers_without_thoughts(scripted: Scripted, tmp_path: Path) -> None:
    scripted(tmp_path / "run", "--baseline", "dromedary")
    folder = tmp_path / "run/iter1"
    answers = read_sealed(folder / "answers.jsonl")
    assert {row["reason"] for row in answers} == {None, "marker_missing"}
    assert {row["thoughts"] for row in kept(answers)} == {"rule 2, informative."}
    assert [row["output"] for row in data(folder)] == [row["output"] for row in kept(answers)]
    assert "Thoughts" not in json.dumps(data(folder))
    adapter = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"] and adapter["r"] == 2


def test_dromedary_at_length_answers_the_same_instructions_again(scripted: Scripted, tmp_path: Path) -> None:
    scripted(tmp_path / "run", "--baseline", "dromedary", *VERBOSE)
    first, second = (read_sealed(tmp_path / f"run/iter{t}/answers.jsonl") for t in (1, 2))
    assert [row["instruction"] for row in first] == [row["instruction"] for row in second]
    assert "thoughts" not in second[0] and len(data(tmp_path / "run/iter2")) == 12
    assert "repeat others" not in (tmp_path / "run/events.jsonl").read_text()
    assert "instruct: prompts" in (tmp_path / "run/summary.md").read_text()


def data(folder: Path) -> list[dict]:
    return json.loads((folder / "dataset.json").read_bytes())


def test_a_model_without_the_format_ends_with_what_became_of_its_rows(scripted: Scripted, tmp_path: Path) -> None:
    scripted.play = script
    with pytest.raises(UserError, match=r"none of \d+ .* is left to train on .*12 by answer marker_missing"):
        scripted(tmp_path / "run", "--baseline", "dromedary")


def test_too_few_seeds_for_eight_in_a_prompt(scripted: Scripted, given: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in seed_rows(7)))
    with pytest.raises(UserError, match="has 7 seed tasks, but each prompt shows 8"):
        scripted(tmp_path / "run", "--baseline", "self_instruct_2022", "--seeds", str(few))


def test_the_recipe_samples_what_its_cells_share_once(scripted: Scripted, tmp_path: Path) -> None:
    scripted(tmp_path / "grid", "--recipe", "baselines")
    results = json.loads((tmp_path / "grid/results.json").read_bytes())
    assert [each["status"] for each in results.values()] == ["finished"] * len(results)
    # Another method's request has another prompt, though its id is the same; what each adapter says is its own.
    asked = Counter((request.id, request.prompt_token_ids) for request in scripted.asked if not request.adapter)
    assert set(asked.values()) == {1}
    cells = ("isheep", "dromedary_iter1", "dromedary")
    own, same, engraved = (digests(tmp_path / "grid" / name) for name in cells)
    name = "iter1/instructions.jsonl"
    assert own == same and own[name] == engraved[name]
