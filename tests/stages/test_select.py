"""The ledger tells every instruction's story; the kept pairs become dataset.json; none kept ends with the way out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isheep.config import SelectConfig, UserError
from isheep.filter.kmeans import kmeans
from isheep.stages import Iteration, read_sealed
from isheep.stages import select as module
from isheep.stages.select import select
from isheep.summary import stage_counts
from tests.scripted import Stopped, folder_bytes, iteration, sealed

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


NUM_PAIRS = 12
DENSITY = SelectConfig(method="density", num_clusters=3)


def with_vectors(it: Iteration) -> Iteration:
    """Twelve measured pairs and one dropped by a rule. Their mean vectors lie in 3 places, their last ones in 4."""
    ids = [f"{it.name}/0.{i}" for i in range(NUM_PAIRS + 1)]
    pairs = [{"id": i, "instruction": i, "input": "", "output": "x", "finish_reason": "stop"} for i in ids]
    found = [{"verdict": "dropped", "reason": "url"}] + [{"verdict": "kept", "reason": None}] * NUM_PAIRS
    sealed(it.file("instructions.jsonl"), [pair | found[-1] | {"most_similar": []} for pair in pairs])
    sealed(it.file("answers.jsonl"), [pair | judged for pair, judged in zip(pairs, found)])
    measures = [{"id": row_id, "output_ppl": 2.0, "pair_ppl": 20.0 - i} for i, row_id in enumerate(ids[1:])]
    sealed(it.file("measures.jsonl"), measures)
    noise = 0.1 * torch.randn(NUM_PAIRS, 5, generator=torch.Generator().manual_seed(0))
    places = torch.arange(NUM_PAIRS)[:, None]
    save_file({"mean": noise + 10 * (places % 3), "last": noise + 10 * (places % 4)}, it.file("vectors.safetensors"))
    return it


def clusters_of(it: Iteration) -> list[int]:
    return [row["cluster"] for row in read_sealed(it.file("selected.jsonl")) if "cluster" in row]


def kept_of(it: Iteration) -> list[int]:
    """Places of the kept rows among the measured ones."""
    rows = [row for row in read_sealed(it.file("selected.jsonl")) if row["stage"] == "select"]
    return [i for i, row in enumerate(rows) if row["verdict"] == "kept"]


@pytest.mark.parametrize(("pooling", "num_clusters"), [("mean", 3), ("last", 4)])
def test_density_keeps_one_pair_of_each_cluster_of_the_pooled_vectors(
    tmp_path: Path, pooling: str, num_clusters: int
) -> None:
    it = with_vectors(iteration(tmp_path))
    select(it, SelectConfig(method="density", num_clusters=num_clusters), (), pooling)
    labels = clusters_of(it)
    assert len(labels) == NUM_PAIRS and len({(k, i % num_clusters) for i, k in enumerate(labels)}) == num_clusters
    assert sorted(i % num_clusters for i in kept_of(it)) == list(range(num_clusters))
    assert len(json.loads(it.file("dataset.json").read_text())) == num_clusters
    assert stage_counts(it.folder, "select")["- same_cluster"] == NUM_PAIRS - num_clusters
    first = read_sealed(it.file("selected.jsonl"))[0]
    assert (first["stage"], first["reason"]) == ("answer", "url") and "cluster" not in first


def test_density_ppl_keeps_the_lowest_pair_ppl(tmp_path: Path) -> None:
    it = with_vectors(iteration(tmp_path))
    select(it, SelectConfig(method="density_ppl", num_clusters=3), ())
    assert kept_of(it) == [9, 10, 11]  # the perplexities fall from row to row


def test_seed_and_iteration_are_in_the_draw(tmp_path: Path) -> None:
    drawn = set()
    for seed in range(4):
        for number in (1, 2):
            it = with_vectors(iteration(tmp_path / str(seed), number, seed=seed))
            select(it, DENSITY, ())
            drawn.add(tuple(kept_of(it)))
    assert len(drawn) > 3


def test_stopped_while_it_clusters_it_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stopped

    whole, it = with_vectors(iteration(tmp_path / "whole")), with_vectors(iteration(tmp_path / "stopped"))
    select(whole, DENSITY, ())
    monkeypatch.setattr(module, "kmeans", stop)
    with pytest.raises(Stopped):
        select(it, DENSITY, ())
    monkeypatch.setattr(module, "kmeans", kmeans)
    select(it, DENSITY, ())
    assert folder_bytes(it.folder) == folder_bytes(whole.folder)
    monkeypatch.setattr(module, "kmeans", stop)  # what is sealed is not clustered again
    select(it, DENSITY, ())


def test_fewer_pairs_than_clusters_is_one_sentence_and_a_first_iteration_goes_on(tmp_path: Path) -> None:
    it = with_vectors(iteration(tmp_path))
    before = folder_bytes(it.folder)
    with pytest.raises(UserError, match=r"12 pairs cannot fill select\.num_clusters = 13: give at most 12, .*toml"):
        select(it, SelectConfig(method="density", num_clusters=13), ())
    assert folder_bytes(it.folder) == before
    select(it, SelectConfig(method="density", num_clusters=12), ())
    assert kept_of(it) == list(range(12))
    later = with_vectors(iteration(tmp_path, 2))
    with pytest.raises(UserError, match=r"iter2: 12 pairs .* with another --out; everything .* stays in"):
        select(later, SelectConfig(method="density", num_clusters=13), ())


def test_what_was_clustered_is_not_taken_for_other_vectors(tmp_path: Path) -> None:
    it = with_vectors(iteration(tmp_path))
    select(it, DENSITY, ())
    with pytest.raises(UserError, match=r"settings\.pooling \(mean, now last\)"):
        select(it, DENSITY, (), "last")
    save_file({"mean": torch.zeros(NUM_PAIRS, 5)}, it.file("vectors.safetensors"))
    with pytest.raises(UserError, match=r"inputs\.vectors"):
        select(it, DENSITY, ())


@pytest.mark.parametrize("method", ["density", "density_ppl"])
def test_nothing_to_cluster_is_counted_as_ever(tmp_path: Path, method: str) -> None:
    it = iteration(tmp_path)
    for name in ("instructions", "answers", "measures"):
        sealed(it.file(f"{name}.jsonl"), [])
    save_file({"mean": torch.zeros(0, 5)}, it.file("vectors.safetensors"))
    with pytest.raises(UserError, match=r"no completion had one\): raise instruct.data_size"):
        select(it, SelectConfig(method=method), ())
