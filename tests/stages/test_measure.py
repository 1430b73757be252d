"""Pairs are measured by the model that wrote them, in batches that a stop does not move."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isheep import score
from isheep.artifacts import Journal
from isheep.config import AnswerConfig, MeasureConfig, SamplerConfig
from isheep.model.lora import LoRAConfig, attach
from isheep.model.transformer import Transformer
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.score import Item, score_rows
from isheep.stages import Iteration, kept, measure, read_sealed, verdict
from isheep.stages.answer import answer
from isheep.stages.caught import Catch
from isheep.stages.measure import measure as measure_stage
from isheep.text.tokenizer import Tokenizer
from tests.scripted import Stopped, folder_bytes, iteration, sealed, stopping, tiny_tokenizer, words
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


PROMPT = MeasureConfig(context="prompt", batch_tokens=300)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model()


Streaming = Callable[[Iterable[Request]], Iterator[Completion]]


def tiny_sampler(model: Transformer, tokenizer: Tokenizer) -> Sampler:
    """Half of its answers end by themselves."""
    return Sampler(model, tokenizer, SamplerConfig(max_num_seqs=3), eos_token_ids=range(0, 250, 9))


def answered(it: Iteration, tokenizer: Tokenizer, stream: Streaming, width: int = 48) -> Iteration:
    """Sixteen instructions and what the model says to them, with the measures caught on the way."""
    if not it.file("instructions.jsonl").exists():
        texts = {f"iter1/0.{i}": words(f"i{i}", 3 + i) for i in range(16)}
        rows = [{"id": key, "instruction": text, "input": "", **verdict(None)} for key, text in texts.items()]
        sealed(it.file("instructions.jsonl"), rows)
    answer(it, stream, tokenizer, it.folder, AnswerConfig(max_tokens=12), width)
    return it


def measures(it: Iteration) -> dict[str, tuple[dict, torch.Tensor]]:
    """id -> {output_ppl, ...}, [2, C]."""
    rows, vectors = read_sealed(it.file("measures.jsonl")), load_file(it.file("vectors.safetensors"))
    pooled = torch.stack([vectors["mean"], vectors["last"]], dim=1)
    return {row.pop("id"): (row, pool) for row, pool in zip(rows, pooled, strict=True)}


def assert_same_measures(got: tuple[dict, torch.Tensor], expected: tuple[dict, torch.Tensor]) -> None:
    assert got[0] == {k: v if v is None else pytest.approx(v, rel=1e-4) for k, v in expected[0].items()}
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


def test_what_is_caught_is_what_scoring_gives_and_costs_no_pass(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[Request, Completion]] = {}

    def watched(requests: Iterable[Request]) -> Iterator[Completion]:
        asked = list(requests)
        for completion in tiny_sampler(model, tokenizer).stream(asked):
            request = next(request for request in asked if request.id == completion.id)
            seen[completion.id.removesuffix("/answer")] = (request, completion)
            yield completion

    it = answered(iteration(tmp_path), tokenizer, watched)
    pairs = kept(read_sealed(it.file("answers.jsonl")))
    assert all(row["caught"] for row in pairs) and {row["finish_reason"] for row in pairs} == {"stop", "length"}
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", no_pass)
        measure_stage(it, model, tokenizer, PROMPT)
    found = measures(it)
    assert list(found) == [row["id"] for row in pairs]
    for key, got in found.items():
        request, completion = seen[key]
        was_cut = completion.finish_reason == "length"
        prompt, output = list(request.prompt_token_ids), completion.token_ids[: None if was_cut else -1]
        item = Item([], prompt + output, len(prompt), len(prompt) + len(output) - was_cut)
        scores, vectors = score._score(model, [item], None, True)
        assert_same_measures(got, (scores[0], vectors[0]))


def no_pass(*_: object) -> None:
    raise AssertionError("a forward pass")


def test_what_was_not_caught_is_scored_given_its_prompt(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    def half_of_it_known(requests: Iterable[Request]) -> Iterator[Completion]:
        for i, completion in enumerate(tiny_sampler(model, tokenizer).stream(requests)):
            yield replace(completion, vectors=None) if i % 2 else completion

    it = answered(iteration(tmp_path), tokenizer, half_of_it_known)
    measure_stage(it, model, tokenizer, PROMPT)
    found, pairs = measures(it), kept(read_sealed(it.file("answers.jsonl")))
    others = [row for row in pairs if not row["caught"]]
    assert len(others) > 3 and list(found) == [row["id"] for row in pairs if row["caught"]] + [r["id"] for r in others]
    for row in others:
        prompt = it.template.prompt(row["instruction"], row["input"])
        (scored,) = score_rows(model, tokenizer, [row], vectors=True, prompt=lambda _, text=prompt: text)
        assert_same_measures(found[row["id"]], (scored.scores[0], scored.vectors[0]))


def test_an_answer_cut_within_its_tokens_is_not_caught(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    it = iteration(tmp_path)
    with Journal(tmp_path / "answers.jsonl", {}) as journal:
        catch = Catch(it.file("caught.safetensors"), 48, journal, tokenizer)
        params = catch.asks(SamplingParams(max_tokens=20, stop=("e",), ignore_eos=True, temperature=0.5), 4)
        requests = [Request(f"r{i}", (1, 2, 3, 4 + i), params) for i in range(40)]
        found = []
        for completion in tiny_sampler(model, tokenizer).stream(requests):
            found.append((catch.of(completion), completion))
            journal.append(completion.id, [{"caught": found[-1][0]}])
        catch.save([request.id for request in requests])
    inside = [row for row, c in found if tokenizer.decode(c.token_ids[:-1]) != c.text and c.finish_reason == "stop"]
    assert len(inside) > 2 and inside == [None] * len(inside)
    vectors, of = load_file(it.file("caught.safetensors")), {c.id: c.vectors for row, c in found if row}
    expected = torch.stack([of[request.id] for request in requests if request.id in of])
    assert torch.equal(torch.stack([vectors["mean"], vectors["last"]], dim=1), expected)


def test_catching_stopped_anywhere_ends_in_the_same_measures(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    whole = answered(iteration(tmp_path / "whole"), tokenizer, tiny_sampler(model, tokenizer).stream)
    measure_stage(whole, model, tokenizer, PROMPT)
    expected = measures(whole)
    for after in (0, 5, 11):
        it = iteration(tmp_path / f"stopped{after}")
        with pytest.raises(Stopped):
            answered(it, tokenizer, stopping(tiny_sampler(model, tokenizer), after))  # type: ignore[arg-type]
        answered(it, tokenizer, tiny_sampler(model, tokenizer).stream)
        measure_stage(it, model, tokenizer, PROMPT)
        assert not list(it.folder.glob("*.part"))
        assert list(measures(it)) == list(expected)
        for key, got in measures(it).items():
            assert_same_measures(got, expected[key])
