"""Perplexities and vectors against transformers, and a resume that ends in the same bytes."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isheep import score
from isheep.config import UserError
from isheep.model.lora import LoRAConfig, attach, save_adapter
from isheep.model.transformer import Transformer
from isheep.score import Scored, score_rows
from isheep.text.templates import template
from isheep.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import tiny_model, transformers_twin, write_checkpoint

WORDS = "the in on an is of to you for and ing red blue seven answer (a) 12 . ? é".split()


def pairs(num: int) -> list[dict[str, Any]]:
    """Rows of all lengths, empty and one-token texts among them."""

    def text(n: int, at: int) -> str:
        return " ".join(WORDS[(at + 7 * i) % len(WORDS)] for i in range(n))

    rows = [
        {"instruction": text(i % 9, i), "input": text(i % 4, 2 * i), "output": text(3 * i % 23, i)} for i in range(num)
    ]
    return [*rows, {"instruction": "", "input": "", "output": ""}, {"instruction": "", "output": "a"}]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model("qwen2_gqa_tied")


@pytest.fixture(scope="module")
def tokenizer(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_checkpoint(model, tmp_path_factory.mktemp("t"), "qwen2_gqa_tied"))


def scores_of(batches: list[Scored]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.scores]


@torch.no_grad()
def peer_ppl(twin: torch.nn.Module, ids: list[int]) -> float | None:
    if len(ids) < 2:
        return None
    logits = twin(torch.tensor([ids])).logits[0, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item())


@pytest.mark.parametrize("join", ["", "\n"])
def test_scores_and_vectors_equal_transformers(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, join: str
) -> None:
    twin = transformers_twin(model, tmp_path, "qwen2_gqa_tied")
    rows = pairs(30)
    batches = list(score_rows(model, tokenizer, rows, join, vectors=True, batch_tokens=200))
    assert len(batches) > 3
    assert [batch.first for batch in batches] == [sum(len(b.scores) for b in batches[:i]) for i in range(len(batches))]
    vectors = torch.cat([batch.vectors for batch in batches])  # type: ignore[misc]
    assert vectors.shape == (len(rows), 2, model.config.hidden_size)
    for row, scores, pooled in zip(rows, scores_of(batches), vectors, strict=True):
        output = tokenizer.encode(row["output"])
        parts = [row["instruction"], row.get("input", ""), row["output"]]
        pair = tokenizer.encode(join.join(part for part in parts if part))
        assert (scores["num_output_tokens"], scores["num_pair_tokens"]) == (len(output), len(pair))
        for name, ids in (("output_ppl", output), ("pair_ppl", pair)):
            expected = peer_ppl(twin, ids)
            assert scores[name] == (expected if expected is None else pytest.approx(expected, rel=1e-4))
        if pair:
            with torch.no_grad():
                hidden = twin.model(torch.tensor([pair])).last_hidden_state[0]
            torch.testing.assert_close(pooled, torch.stack([hidden.mean(0), hidden[-1]]), rtol=1e-4, atol=1e-4)
        else:
            assert not pooled.any()


def test_given_a_prompt_scores_and_vectors_equal_transformers(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    twin, asked = transformers_twin(model, tmp_path, "qwen2_gqa_tied"), template("chatml")
    rows = [{**row, "finish_reason": "length" if i % 3 else "stop"} for i, row in enumerate(pairs(20))]

    def prompt(row: Mapping[str, Any]) -> str:
        return asked.prompt(row["instruction"], row.get("input", ""))

    batches = list(score_rows(model, tokenizer, rows, vectors=True, batch_tokens=300, prompt=prompt))
    vectors = torch.cat([batch.vectors for batch in batches])
    for row, scores, pooled in zip(rows, scores_of(batches), vectors, strict=True):
        before, output = tokenizer.encode(prompt(row)), tokenizer.encode(row["output"])
        ids = torch.tensor([before + output])
        assert (scores["num_output_tokens"], scores["num_pair_tokens"]) == (len(output), ids.shape[1])
        with torch.no_grad():
            out = twin(ids, output_hidden_states=True)
        nll = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), ids[0, 1:], reduction="none")
        assert scores["pair_ppl"] == pytest.approx(nll.mean().exp().item(), rel=1e-4)
        expected = nll[len(before) - 1 :].mean().exp().item() if output else None
        assert scores["output_ppl"] == (expected if expected is None else pytest.approx(expected, rel=1e-4))
        hidden = out.hidden_states[-1][0, : ids.shape[1] - (row["finish_reason"] == "length")]
        torch.testing.assert_close(pooled, torch.stack([hidden.mean(0), hidden[-1]]), rtol=1e-4, atol=1e-4)


def test_the_batch_size_changes_nothing_beyond_rounding(model: Transformer, tokenizer: Tokenizer) -> None:
    rows = pairs(20)
    one_by_one = scores_of(list(score_rows(model, tokenizer, rows, batch_tokens=1)))
    together = scores_of(list(score_rows(model, tokenizer, rows)))
    for a, b in zip(one_by_one, together, strict=True):
        assert a == {k: v if v is None else pytest.approx(v, rel=1e-4) for k, v in b.items()}


def test_an_adapter_is_seen(model: Transformer, tokenizer: Tokenizer) -> None:
    adapter = attach(model, LoRAConfig(r=4), "a")
    torch.nn.init.normal_(next(iter(adapter.pairs.values())).lora_B)
    rows = pairs(4)
    base, tuned = (scores_of(list(score_rows(model, tokenizer, rows, adapter=name))) for name in (None, "a"))
    assert base[3]["pair_ppl"] != tuned[3]["pair_ppl"]


def test_a_long_text_is_cut_at_the_context(
    model: Transformer, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"instruction": "the " * 600, "output": "answer"}
    (batch,) = score_rows(model, tokenizer, [long])
    assert batch.scores[0]["num_pair_tokens"] == model.config.context_len == 512
    with caplog.at_level("WARNING"):
        list(score_rows(model, tokenizer, [long, long, pairs(3)[2]]))
    assert "2 of 3 rows are longer" in caplog.text


def test_numbers_that_overflow_are_told(model: Transformer, tokenizer: Tokenizer) -> None:
    broken = tiny_model("qwen2_gqa_tied")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="--dtype float32"):
        list(score_rows(broken, tokenizer, pairs(3)))


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Path, out: Path, *more: str) -> None:
    args = ["--model", str(folder), "--data", str(data), "--out", str(out), "--dtype", "float32", *more]
    monkeypatch.setattr(sys, "argv", ["score", *args])
    score.main()


def test_the_command_resumes_to_the_same_bytes(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_checkpoint(model, tmp_path / "model", "qwen2_gqa_tied")
    save_adapter(attach(tiny_model("qwen2_gqa_tied"), LoRAConfig(r=4), "a"), tmp_path / "adapter", "tiny")
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps([*pairs(20), {"output": 3}, "no row"]))
    flags = ("--set", "batch_tokens=100", "--adapter", str(f"a={tmp_path / 'adapter'}"))
    whole = tmp_path / "whole.jsonl"
    call(monkeypatch, folder, data, whole, "--vectors", str(tmp_path / "whole.vectors"), *flags)
    written = [json.loads(line) for line in whole.read_text().splitlines()]
    assert len(written) == 22
    assert {**written[5], **pairs(20)[5]} == written[5]
    vectors = load_file(tmp_path / "whole.vectors")
    assert {name: tuple(t.shape) for name, t in vectors.items()} == {"mean": (22, 48), "last": (22, 48)}

    real, calls = score._score, iter(range(100))

    def stopped_at_third(*args: Any) -> Any:
        if next(calls) % 3 == 2:
            raise KeyboardInterrupt
        return real(*args)

    out, flags = tmp_path / "out.jsonl", (*flags, "--vectors", str(tmp_path / "out.vectors"))
    monkeypatch.setattr(score, "_score", stopped_at_third)
    interrupts = 0
    while not out.exists():
        try:
            call(monkeypatch, folder, data, out, *flags)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 2
    assert out.read_bytes() == whole.read_bytes()
    assert (tmp_path / "out.vectors").read_bytes() == (tmp_path / "whole.vectors").read_bytes()
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / "out.vectors.part").write_bytes(b"as a kill after the seal leaves it")
    call(monkeypatch, folder, data, out, *flags)
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(UserError, match=r"settings\.join"):
        call(monkeypatch, folder, data, out, "--join", " ", *flags)
    with pytest.raises(UserError, match=r"settings\.template"):
        call(monkeypatch, folder, data, out, "--template", "chatml", *flags)
    with pytest.raises(UserError, match='no template "chatml2"'):
        call(monkeypatch, folder, data, out, "--template", "chatml2", *flags)
    call(monkeypatch, folder, data, tmp_path / "given.jsonl", "--template", "chatml")
    given = json.loads((tmp_path / "given.jsonl").read_text().splitlines()[5])
    assert given["output_ppl"] != written[5]["output_ppl"] and given["num_pair_tokens"] > written[5]["num_pair_tokens"]
