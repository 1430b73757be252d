"""Pairs are measured by the model that wrote them, in batches that a stop does not move."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isheep.config import MeasureConfig
from isheep.model.lora import LoRAConfig, attach
from isheep.score import score_rows
from isheep.stages import Iteration, measure, read_sealed
from isheep.stages.measure import measure as measure_stage
from isheep.text.tokenizer import Tokenizer
from tests.scripted import Stopped, folder_bytes, iteration, sealed, tiny_tokenizer, words
from tests.tiny import tiny_model

CFG = MeasureConfig(batch_tokens=300)


def written(it: Iteration) -> Iteration:
    pairs = [
        {"id": f"iter1/0.{i}", "instruction": words(f"i{i}", 5), "input": "", "output": words(f"o{i}", 3 + i)}
        | {"verdict": "dropped" if i == 2 else "kept"}
        for i in range(9)
    ]
    sealed(it.file("answers.jsonl"), pairs)
    return it


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


def test_rows_and_vectors_are_those_of_the_pairs_that_are_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    it, model = written(iteration(tmp_path)), tiny_model()
    measure_stage(it, model, tokenizer, CFG)
    rows = read_sealed(it.file("measures.jsonl"))
    assert [row["id"] for row in rows] == [f"iter1/0.{i}" for i in range(9) if i != 2]
    pairs = [row for row in read_sealed(it.file("answers.jsonl")) if row["verdict"] == "kept"]
    (alone,) = score_rows(model, tokenizer, pairs[4:5], vectors=True)
    assert rows[4] == {"id": pairs[4]["id"], **alone.scores[0]}
    vectors = load_file(it.file("vectors.safetensors"))
    assert vectors["mean"].shape == vectors["last"].shape == (8, 48)
    torch.testing.assert_close(torch.stack([vectors["mean"][4], vectors["last"][4]]), alone.vectors[0])


def test_a_tuned_model_measures_through_its_adapter(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model()
    adapter = attach(model, LoRAConfig(), "iter1", seed=1)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    base, tuned = written(iteration(tmp_path / "a")), written(iteration(tmp_path / "b", adapter="iter1"))
    measure_stage(base, model, tokenizer, CFG)
    measure_stage(tuned, model, tokenizer, CFG)
    ppls = [[row["pair_ppl"] for row in read_sealed(it.file("measures.jsonl"))] for it in (base, tuned)]
    assert all(a != b for a, b in zip(*ppls))


def test_stopped_after_any_batch_it_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    whole = written(iteration(tmp_path / "whole"))
    measure_stage(whole, model, tokenizer, CFG)
    num_batches = len(list(score_rows(model, tokenizer, read_sealed(whole.file("answers.jsonl")), batch_tokens=300)))
    assert num_batches > 2
    for after in range(num_batches - 1):
        it = written(iteration(tmp_path / str(after)))
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(measure, "score_rows", stopped_after(after))
            measure_stage(it, model, tokenizer, CFG)
        measure_stage(it, model, tokenizer, CFG)
        assert folder_bytes(it.folder) == folder_bytes(whole.folder)


def stopped_after(num_batches: int):  # type: ignore[no-untyped-def]
    def rows(*args):  # type: ignore[no-untyped-def]
        for n, batch in enumerate(score_rows(*args)):
            if n == num_batches:
                raise Stopped
            yield batch

    return rows


def test_what_a_kill_after_the_seal_leaves_is_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    it, model = written(iteration(tmp_path)), tiny_model()
    measure_stage(it, model, tokenizer, CFG)
    it.file("vectors.safetensors.part").write_bytes(b"rows")
    measure_stage(it, model, tokenizer, CFG)
    assert not it.file("vectors.safetensors.part").exists()


def test_no_pair_left_is_an_empty_result(tmp_path: Path, tokenizer: Tokenizer) -> None:
    it = iteration(tmp_path)
    sealed(it.file("answers.jsonl"), [])
    measure_stage(it, tiny_model(), tokenizer, CFG)
    assert read_sealed(it.file("measures.jsonl")) == []
    assert load_file(it.file("vectors.safetensors"))["mean"].shape == (0, 48)
