"""Each kept instruction is answered once, through the template of the model that answers; rules drop pairs."""

from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from isheep.config import AnswerConfig, SamplerConfig, UserError
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request
from isheep.stages import Iteration, read_sealed
from isheep.stages.answer import answer
from isheep.text.principles import LONG_ANSWERS, SHARED_TEXT, principle_prompt
from isheep.text.templates import template
from isheep.text.tokenizer import Tokenizer
from tests.scripted import ScriptedSampler, Stopped, folder_bytes, iteration, sealed, stopping, tiny_tokenizer, words
from tests.tiny import tiny_model

SEEDS = Path("none")  # what is asked zero-shot needs none


def instructions(n: int = 9) -> list[dict]:
    """Every third one was dropped by the stage before."""
    return [
        {
            "id": f"iter1/0.{i}",
            "instruction": words(f"i{i}", 6),
            "input": "" if i % 2 else words(f"in{i}", 4),
            "most_similar": [],
        }
        | ({"verdict": "dropped", "reason": "similar"} if i % 3 == 2 else {"verdict": "kept", "reason": None})
        for i in range(n)
    ]


@pytest.fixture
def it(tmp_path: Path) -> Iteration:
    return written(iteration(tmp_path))


def written(it: Iteration) -> Iteration:
    sealed(it.file("instructions.jsonl"), instructions())
    return it


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


def test_the_kept_ones_are_answered_in_their_order(it: Iteration, tokenizer: Tokenizer) -> None:
    answer(it, ScriptedSampler(shuffle=3).stream, tokenizer, SEEDS, AnswerConfig())
    rows = read_sealed(it.file("answers.jsonl"))
    assert [row["id"] for row in rows] == [f"iter1/0.{i}" for i in (0, 1, 3, 4, 6, 7)]
    assert rows[0]["output"] == words("iter1/0.0/answer", 12) + "."
    assert rows[0]["verdict"] == "kept" and rows[0]["num_output_tokens"] == 12


def test_rules_drop_pairs_with_a_reason(it: Iteration, tokenizer: Tokenizer) -> None:
    def play(request: Request) -> str:
        return {"iter1/0.0/answer": "", "iter1/0.1/answer": "User: and now?"}.get(request.id, "Fine.")

    answer(it, ScriptedSampler(play).stream, tokenizer, SEEDS, AnswerConfig())
    reasons = [row["reason"] for row in read_sealed(it.file("answers.jsonl"))]
    assert reasons == ["empty_output", "role_label", None, None, None, None]


def test_base_is_asked_in_raw_text_and_a_tuned_model_in_its_format(tmp_path: Path, tokenizer: Tokenizer) -> None:
    base, tuned = ScriptedSampler(), ScriptedSampler()
    answer(written(iteration(tmp_path / "a")), base.stream, tokenizer, SEEDS, AnswerConfig())
    it = written(iteration(tmp_path / "b", template=template("chatml"), adapter="iter0"))
    answer(it, tuned.stream, tokenizer, SEEDS, AnswerConfig(temperature=0.5, max_tokens=7))
    row = instructions()[0]
    assert base.seen[0].adapter is None and tuned.seen[0].adapter == "iter0"
    assert tokenizer.decode(list(base.seen[0].prompt_token_ids)) == f"{row['instruction']}\n{row['input']}\n"
    assert list(tuned.seen[0].prompt_token_ids) == tokenizer.encode(
        it.template.prompt(row["instruction"], row["input"])
    )
    assert tuned.seen[0].params.temperature == 0.5 and tuned.seen[0].params.max_tokens == 7


def test_joined_as_the_paper_ran_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = instructions()[0]
    for name in ("raw", "chatml"):
        sampler, it = ScriptedSampler(), written(iteration(tmp_path / name, template=template(name), paper_joins=True))
        answer(it, sampler.stream, tokenizer, SEEDS, AnswerConfig())
        text = tokenizer.decode(list(sampler.seen[0].prompt_token_ids))
        assert f"{row['instruction']}{row['input']}\n" in text
        with pytest.raises(UserError, match=r"paper_joins \(True, now False\)"):
            answer(replace(it, paper_joins=False), sampler.stream, tokenizer, SEEDS, AnswerConfig())


def test_stopped_anywhere_it_asks_only_what_is_left(tmp_path: Path, it: Iteration, tokenizer: Tokenizer) -> None:
    answer(it, ScriptedSampler().stream, tokenizer, SEEDS, AnswerConfig())
    whole = folder_bytes(it.folder)
    for after in range(6):
        again = written(iteration(tmp_path / f"stopped{after}"))
        with pytest.raises(Stopped):
            answer(again, stopping(ScriptedSampler(shuffle=after), after), tokenizer, SEEDS, AnswerConfig())
        rest = ScriptedSampler()
        answer(again, rest.stream, tokenizer, SEEDS, AnswerConfig())
        assert len(rest.seen) == 6 - after
        assert folder_bytes(again.folder) == whole


def test_an_instruction_longer_than_the_context_is_dropped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = instructions(2)
    rows[0]["instruction"] = words("long", 400)
    it = iteration(tmp_path, context_len=512)
    sealed(it.file("instructions.jsonl"), rows)
    answer(it, ScriptedSampler().stream, tokenizer, SEEDS, AnswerConfig())
    assert [row["reason"] for row in read_sealed(it.file("answers.jsonl"))] == ["exceeds_context", None]


def test_nothing_to_answer_is_an_empty_result(tmp_path: Path, tokenizer: Tokenizer) -> None:
    it = iteration(tmp_path)
    sealed(it.file("instructions.jsonl"), [])
    answer(it, ScriptedSampler().stream, tokenizer, SEEDS, AnswerConfig())
    assert read_sealed(it.file("answers.jsonl")) == []


PRINCIPLES = AnswerConfig(method="principles", temperature=0.5, max_tokens=256)
REPLIES = {
    "iter1/0.0/answer": ("Thoughts: rule 2.\nAnswer: Fine: e.g. this.", "Fine: e.g. this.", "rule 2.", None),
    "iter1/0.1/answer": ("Just an answer.", "Just an answer.", "", "marker_missing"),
    "iter1/0.3/answer": ("Thoughts: rule 2.\nAnswer:\n", "", "rule 2.", "empty_output"),
}


def reply(request: Request) -> str:
    return REPLIES.get(request.id, REPLIES["iter1/0.0/answer"])[0]


def test_principled_answers_need_both_parts_and_keep_one(it: Iteration, tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler(reply)
    answer(it, sampler.stream, tokenizer, SEEDS, PRINCIPLES)
    rows = read_sealed(it.file("answers.jsonl"))
    found = [[row["output"], row["thoughts"], row["reason"]] for row in rows]
    assert found[:3] == [expected for _, *expected in REPLIES.values()]
    first = next(request for request in sampler.seen if request.id == "iter1/0.0/answer")
    row = instructions()[0]
    text = tokenizer.decode(list(first.prompt_token_ids))
    assert text == principle_prompt(f"{row['instruction']}\n{row['input']}")
    assert (first.params.temperature, first.params.top_p, first.params.max_tokens) == (0.5, 0.95, 256)


def test_the_model_that_was_trained_on_principles_answers_at_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    cfg = replace(PRINCIPLES, verbose=True)
    first, second = ScriptedSampler(), ScriptedSampler(lambda request: "" if "0.1" in request.id else "Long.")
    answer(written(iteration(tmp_path)), first.stream, tokenizer, SEEDS, cfg)
    assert {request.params.max_tokens for request in first.seen} == {256}, "the base model thinks first"
    it = written(iteration(tmp_path, number=2, template=template("chatml"), adapter="iter1"))
    answer(it, second.stream, tokenizer, SEEDS, cfg)
    assert {(r.params.temperature, r.params.top_p, r.params.max_tokens) for r in second.seen} == {(0.3, 0.7, 512)}
    row = instructions()[0]
    system, user = {"role": "system", "content": LONG_ANSWERS}, f"{row['instruction']}\n{row['input']}"
    asked = it.template.chat([system, {"role": "user", "content": user}])
    assert list(second.seen[0].prompt_token_ids) == tokenizer.encode(asked)
    assert [row["reason"] for row in read_sealed(it.file("answers.jsonl"))] == [None, "empty_output", *[None] * 4]


def num_common(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b))))


def test_rules_and_exemplars_are_computed_once(it: Iteration, tokenizer: Tokenizer) -> None:
    """All requests come in the same step; each computes no full block that one before it has in common with it."""
    context_len = 16384
    model = tiny_model(max_position_embeddings=context_len)
    sampler = Sampler(model, tokenizer, SamplerConfig(max_num_seqs=8, max_num_batched_tokens=2048, kv_cache_gib=0.05))
    answer(replace(it, context_len=context_len), sampler.stream, tokenizer, SEEDS, replace(PRINCIPLES, max_tokens=4))
    size = sampler.cfg.block_size
    rows = [row for row in instructions() if row["verdict"] == "kept"]
    prompts = [
        tokenizer.encode(principle_prompt(it.template.content(row["instruction"], row["input"]))) for row in rows
    ]
    shared = [
        max((num_common(prompt, before) for before in prompts[:i]), default=0) // size * size
        for i, prompt in enumerate(prompts)
    ]
    assert len(prompts) == 6 and all(num >= len(tokenizer.encode(SHARED_TEXT)) // size * size for num in shared[1:])
    assert sampler.stats.num_cached_tokens == sum(shared)
    assert sampler.stats.num_prefill_tokens == sum(map(len, prompts)) - sum(shared)
