"""The ledger tells every instruction's story; the kept pairs become dataset.json; none kept ends with the way out."""

import json
from pathlib import Path

import pytest

from isheep.config import SelectConfig, UserError
from isheep.stages import Iteration, read_sealed
from isheep.stages.select import select
from isheep.summary import stage_counts
from tests.scripted import folder_bytes, iteration, sealed

BOTH = ("quality", "following")


def written(it: Iteration, scores: bool = True) -> Iteration:
    """Five instructions: dropped by ROUGE, dropped by a pair rule, low quality, no score, good."""
    instructions = [
        {
            "id": f"iter1/0.{i}",
            "instruction": f"Do {i}.",
            "input": "x",
            "mean_similarity": 0.1,
            "most_similar": [["s", 0.2]],
        }
        | ({"verdict": "dropped", "reason": "similar"} if i == 0 else {"verdict": "kept", "reason": None})
        for i in range(5)
    ]
    answers = [
        {"id": f"iter1/0.{i}", "instruction": f"Do {i}.", "input": "x", "output": f"Done {i}.", "finish_reason": "stop"}
        | ({"verdict": "dropped", "reason": "role_label"} if i == 1 else {"verdict": "kept", "reason": None})
        for i in range(1, 5)
    ]
    found = {2: (6, None), 3: (None, None), 4: (9, 10)}
    sealed(it.file("instructions.jsonl"), instructions)
    sealed(it.file("answers.jsonl"), answers)
    if scores:
        rows = [{"id": f"iter1/0.{i}", "quality_score": q, "following_score": f} for i, (q, f) in found.items()]
        sealed(it.file("scores.jsonl"), rows)
    sealed(it.file("measures.jsonl"), [{"id": f"iter1/0.{i}", "output_ppl": 10.0 * i, "pair_ppl": 5.0} for i in found])
    return it


@pytest.fixture
def it(tmp_path: Path) -> Iteration:
    return written(iteration(tmp_path))


def test_the_ledger_has_every_instruction_with_stage_and_reason(it: Iteration) -> None:
    select(it, SelectConfig(), BOTH)
    rows = read_sealed(it.file("selected.jsonl"))
    assert [(row["stage"], row["verdict"], row["reason"]) for row in rows] == [
        ("instruct", "dropped", "similar"),
        ("answer", "dropped", "role_label"),
        ("select", "dropped", "low_quality"),
        ("select", "dropped", "no_score"),
        ("select", "kept", None),
    ]
    assert rows[4]["output_ppl"] == 40.0 and rows[4]["mean_similarity"] == 0.1 and "most_similar" not in rows[4]
    assert json.loads(it.file("dataset.json").read_text()) == [
        {"instruction": "Do 4.", "input": "x", "output": "Done 4.", "quality_score": 9, "following_score": 10}
    ]


def test_perplexity_needs_no_scores(tmp_path: Path) -> None:
    it = written(iteration(tmp_path), scores=False)
    select(it, SelectConfig(method="ppl", max_ppl=35.0), ())
    kept = json.loads(it.file("dataset.json").read_text())
    assert [row["instruction"] for row in kept] == ["Do 2.", "Do 3."]
    assert kept[0]["quality_score"] is None


def test_none_kept_counts_the_reasons_and_says_what_to_change(it: Iteration) -> None:
    for _ in range(2):  # a second start finds the ledger sealed and says the same
        with pytest.raises(UserError) as error:
            select(it, SelectConfig(threshold=9.5), BOTH)
        text = str(error.value)
        for part in ("none of 5", "1 by instruct similar", "2 by select low_quality", "1 by select no_score"):
            assert part in text
        assert "lower select.threshold = 9.5 (the best quality score is 9)" in text and "data_size" in text
        assert len(read_sealed(it.file("selected.jsonl"))) == 5
        assert not it.file("dataset.json").exists()


def test_no_instruction_at_all_is_said_too(tmp_path: Path) -> None:
    it = iteration(tmp_path)
    for name in ("instructions", "answers", "scores"):
        sealed(it.file(f"{name}.jsonl"), [])
    with pytest.raises(UserError, match="no completion had one"):
        select(it, SelectConfig(), BOTH)


def test_killed_between_ledger_and_dataset_it_is_finished(it: Iteration) -> None:
    select(it, SelectConfig(), BOTH)
    whole = folder_bytes(it.folder)
    it.file("dataset.json").unlink()
    select(it, SelectConfig(), BOTH)
    assert folder_bytes(it.folder) == whole


def verdicts(it: Iteration) -> list[tuple]:
    rows = read_sealed(it.file("selected.jsonl"))
    return [(row["stage"], row["verdict"], row["reason"], row.get("pardoned", "absent")) for row in rows]


def test_without_assessment_every_pair_that_passed_the_rules_is_kept(tmp_path: Path) -> None:
    it = written(iteration(tmp_path), scores=False)
    select(it, SelectConfig(threshold=0), ())
    assert verdicts(it) == [
        ("instruct", "dropped", "similar", "absent"),
        ("answer", "dropped", "role_label", "absent"),
        *[("select", "kept", None, "absent")] * 3,
    ]
    assert {row["quality_score"] for row in json.loads(it.file("dataset.json").read_text())} == {None}
    assert stage_counts(it.folder, "select")["kept"] == 3
    assert "kept against the rules" not in stage_counts(it.folder, "select")


def test_at_minus_one_the_rules_are_pardoned_and_the_ledger_says_which(tmp_path: Path) -> None:
    it = written(iteration(tmp_path), scores=False)
    select(it, SelectConfig(threshold=-1), ())
    assert verdicts(it) == [
        ("instruct", "dropped", "similar", "absent"),
        ("select", "kept", None, "role_label"),
        *[("select", "kept", None, None)] * 3,
    ]
    assert len(json.loads(it.file("dataset.json").read_text())) == 4
    counts = stage_counts(it.folder, "select")
    assert counts["kept"] == 4 and counts["kept against the rules"] == 1


def test_what_never_fitted_the_context_has_no_answer_to_keep(tmp_path: Path) -> None:
    it = iteration(tmp_path)
    row = {"id": "iter1/0.0", "instruction": "Do.", "input": "", "most_similar": [], "verdict": "kept", "reason": None}
    sealed(it.file("instructions.jsonl"), [row])
    unanswered = {"output": "", "finish_reason": None, "verdict": "dropped", "reason": "exceeds_context"}
    sealed(it.file("answers.jsonl"), [{"id": "iter1/0.0", "instruction": "Do.", "input": "", **unanswered}])
    with pytest.raises(UserError, match=r"1 by answer exceeds_context\): raise instruct.data_size"):
        select(it, SelectConfig(threshold=-1), ())
    assert verdicts(it) == [("answer", "dropped", "exceeds_context", None)]


def test_the_best_score_is_that_of_the_level(tmp_path: Path) -> None:
    it = written(iteration(tmp_path), scores=False)
    rows = [{"id": f"iter1/0.{i}", "quality_score": None, "following_score": 5 + i} for i in range(2, 5)]
    sealed(it.file("scores.jsonl"), rows)
    with pytest.raises(UserError, match=r"3 by select low_following.*the best following score is 9"):
        select(it, SelectConfig(threshold=9), ("following",))
