"""Quality is asked of all pairs, following of those that pass; a score is read or it is null. Or as the level says."""

import math
from pathlib import Path

import pytest
import torch

from isheep.config import ASSESS_LEVELS, ASSESS_PROMPTS, AssessConfig, SamplerConfig, SelectConfig, UserError
from isheep.model.batch import PackedBatch
from isheep.model.transformer import Transformer
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request
from isheep.stages import Iteration, read_sealed, verdict
from isheep.stages.assess import assess
from isheep.stages.select import select
from isheep.summary import stage_counts
from isheep.text.prompts import assess_prompt
from isheep.text.tokenizer import Tokenizer
from tests.scripted import ScriptedSampler, Stopped, folder_bytes, iteration, sealed, stopping, tiny_tokenizer, words
from tests.tiny import tiny_model

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


OVERALL = {
    "iter1/0.0/overall": "9||Good.",
    "iter1/0.1/overall": "8||Fine.",
    "iter1/0.2/overall": "I cannot say.",
    "iter1/0.3/overall": " 10",
}
FOLLOWING = {**REPLIES, "iter1/0.1/following": "9.6", "iter1/0.2/following": "none"}  # at its level it is asked of all


def play(request: Request) -> str:
    return (FOLLOWING | OVERALL)[request.id]


# level of a prompt with two questions, or icl's: what is asked, the scores, the reasons in the ledger
LEVELS = {
    "both": (
        [f"{i}/quality" for i in range(4)] + ["0/following", "3/following"],
        [(9, 10), (8, None), (None, None), (10, 7)],
        [None, "low_quality", "no_score", "low_following"],
    ),
    "quality": (
        [f"{i}/quality" for i in range(4)],
        [(9, None), (8, None), (None, None), (10, None)],
        [None, "low_quality", "no_score", None],
    ),
    "following": (
        [f"{i}/following" for i in range(4)],
        [(None, 10), (None, 10), (None, None), (None, 7)],
        [None, None, "no_score", "low_following"],
    ),
    "icl": (
        [f"{i}/overall" for i in range(4)],
        [(9, 9), (8, 8), (None, None), (10, 10)],
        [None, "low_quality", "no_score", None],
    ),
}
COUNTS = {
    "both": {
        "asked for quality": 4,
        "no quality score read": 1,
        "quality scores": "8:1 9:1 10:1",
        "asked for following": 2,
        "no following score read": 0,
        "following scores": "7:1 10:1",
    },
    "quality": {"asked for quality": 4, "no quality score read": 1, "quality scores": "8:1 9:1 10:1"},
    "following": {"asked for following": 4, "no following score read": 1, "following scores": "7:1 10:2"},
    "icl": {"asked for overall": 4, "no overall score read": 1, "overall scores": "8:1 9:1 10:1"},
}
VARIANTS = [(prompt, level) for prompt in ("simple", "combined") for level in ("quality", "following", "both")]
VARIANTS += [("icl", "both")]
each_variant = pytest.mark.parametrize(("prompt", "level"), VARIANTS)


def written(it: Iteration) -> Iteration:
    """Four pairs that passed the rules, and one that did not."""
    pairs = [
        {"id": f"iter1/0.{i}", "instruction": words(f"i{i}", 6), "input": "", "output": words(f"o{i}", 9)}
        for i in range(5)
    ]
    sealed(it.file("instructions.jsonl"), [{**pair, "most_similar": [], **verdict(None)} for pair in pairs])
    judged = [pair | verdict(None if i < 4 else "role_label") for i, pair in enumerate(pairs)]
    sealed(it.file("answers.jsonl"), judged)
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


@each_variant
def test_each_prompt_at_each_level(it: Iteration, tokenizer: Tokenizer, prompt: str, level: str) -> None:
    case = "icl" if prompt == "icl" else level
    asked, scores, reasons = LEVELS[case]
    cfg, sampler = AssessConfig(prompt, level), ScriptedSampler(play, shuffle=2)
    assess(it, sampler.stream, tokenizer, 8.0, cfg)
    replies = read_sealed(it.file("replies.jsonl"))
    assert [f"{row['id']}/{row['question']}" for row in replies] == [f"iter1/0.{key}" for key in asked]
    assert sorted(request.id for request in sampler.seen) == sorted(f"iter1/0.{key}" for key in asked)
    pairs = {pair["id"]: pair for pair in read_sealed(it.file("answers.jsonl"))}
    for request in sampler.seen:
        pair_id, _, question = request.id.rpartition("/")
        assert list(request.prompt_token_ids) == tokenizer.encode(assess_prompt(pairs[pair_id], question, prompt))
    rows = read_sealed(it.file("scores.jsonl"))
    assert [(row["quality_score"], row["following_score"]) for row in rows] == scores
    assert stage_counts(it.folder, "assess") == COUNTS[case]
    select(it, SelectConfig(), ASSESS_LEVELS[level])
    ledger = read_sealed(it.file("selected.jsonl"))
    assert [row["reason"] for row in ledger if row["stage"] == "select"] == reasons


@each_variant
def test_each_level_stopped_anywhere_asks_only_what_is_left(
    tmp_path: Path, it: Iteration, tokenizer: Tokenizer, prompt: str, level: str
) -> None:
    cfg = AssessConfig(prompt, level)
    assess(it, ScriptedSampler(play).stream, tokenizer, 8.0, cfg)
    whole, num_asked = folder_bytes(it.folder), len(read_sealed(it.file("replies.jsonl")))
    for after in range(num_asked):
        again = written(iteration(tmp_path / f"stopped{after}"))
        with pytest.raises(Stopped):
            assess(again, stopping(ScriptedSampler(play, shuffle=after), after), tokenizer, 8.0, cfg)
        rest = ScriptedSampler(play)
        assess(again, rest.stream, tokenizer, 8.0, cfg)
        assert len(rest.seen) == num_asked - after and folder_bytes(again.folder) == whole


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"level": "quality"}, r"settings\.level \(both, now quality\)"),
        ({"level": "following"}, r"settings\.level \(both, now following\)"),
        ({"prompt": "simple"}, r"settings\.prompt \(combined, now simple\)"),
        ({"prompt": "icl"}, r"settings\.prompt \(combined, now icl\)"),
        ({"score_decoding": "greedy"}, r"settings\.score_decoding \(sampled, now greedy\)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_assessment_is_refused(
    it: Iteration, tokenizer: Tokenizer, change: dict, sentence: str, finished: bool
) -> None:
    if finished:
        assess(it, ScriptedSampler(play).stream, tokenizer, 8.0, AssessConfig())
    else:
        with pytest.raises(Stopped):
            assess(it, stopping(ScriptedSampler(play), 2), tokenizer, 8.0, AssessConfig())
    before = folder_bytes(it.folder)
    with pytest.raises(UserError, match=sentence):
        assess(it, ScriptedSampler(play).stream, tokenizer, 8.0, AssessConfig(**change))
    assert folder_bytes(it.folder) == before


@pytest.mark.parametrize(("decoding", "temperature"), [("sampled", 0.7), ("greedy", 0.0)])
@pytest.mark.parametrize("prompt", ASSESS_PROMPTS)
def test_a_score_is_sampled_or_decoded_greedily(
    it: Iteration, tokenizer: Tokenizer, prompt: str, decoding: str, temperature: float
) -> None:
    sampler = ScriptedSampler(play)
    assess(it, sampler.stream, tokenizer, 8.0, AssessConfig(prompt, score_decoding=decoding, temperature=0.7))
    assert {request.params.temperature for request in sampler.seen} == {temperature}


def test_joined_as_the_paper_ran_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    it, sampler = iteration(tmp_path, paper_joins=True), ScriptedSampler(play)
    pair = {"id": "iter1/0.3", "instruction": "Add.", "input": "1 and 2", "output": "3", "verdict": "kept"}
    sealed(it.file("answers.jsonl"), [pair])
    assess(it, sampler.stream, tokenizer, 8.0, AssessConfig())
    texts = [tokenizer.decode(list(request.prompt_token_ids)) for request in sampler.seen]
    assert len(texts) == 2 and all("\nAdd. 1 and 2\n" in text for text in texts)


EXPECTED = AssessConfig(score_decoding="expected")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(max_position_embeddings=4096)


def reader(model: Transformer, tokenizer: Tokenizer, **cfg: int) -> Sampler:
    return Sampler(model, tokenizer, SamplerConfig(**cfg))


def test_an_expected_score_is_the_mean_over_whole_strings(
    it: Iteration, tokenizer: Tokenizer, model: Transformer
) -> None:
    sampler = reader(model, tokenizer)
    assess(it, sampler.stream, tokenizer, 8.0, EXPECTED)
    replies = read_sealed(it.file("replies.jsonl"))
    asked = [f"{row['id']}/{row['question']}" for row in replies]
    assert asked == [f"iter1/0.{i}/{question}" for question in ("quality", "following") for i in range(4)]
    pairs = {pair["id"]: pair for pair in read_sealed(it.file("answers.jsonl"))}
    for row in replies:  # each number behind the question, in a plain pass of its own
        prompt = assess_prompt(pairs[row["id"]], row["question"])
        logprobs = {n: whole_logprob(model, tokenizer, prompt, f" {n}") for n in range(1, 11)}
        weights = {n: math.exp(logprob) for n, logprob in logprobs.items()}
        weights[1] -= weights[10]
        total = sum(weights.values())
        blank = math.exp(whole_logprob(model, tokenizer, prompt, " "))
        assert row["score"] == pytest.approx(sum(n * p for n, p in weights.items()) / total, abs=2e-4)
        assert row["mass"] == pytest.approx(total / blank, rel=1e-3)  # given the blank, which is part of the prompt
        assert row["shares"] == pytest.approx([weights[n] / total for n in range(1, 11)], abs=1e-4)
    rows = read_sealed(it.file("scores.jsonl"))
    assert [row["quality_score"] for row in rows] == [row["score"] for row in replies[:4]]
    assert [row["following_score"] for row in rows] == [row["score"] for row in replies[4:]]
    counts = stage_counts(it.folder, "assess")
    assert counts["no quality score read"] == counts["no following score read"] == 0


@torch.no_grad()
def whole_logprob(model: Transformer, tokenizer: Tokenizer, prompt: str, text: str) -> float:
    ids, start = tokenizer.encode(prompt + text), len(tokenizer.encode(prompt))
    logprobs = model.logits(model(PackedBatch.pack([ids], "cpu"))).double().log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_expected_scores_cost_no_decode_step_and_share_the_pair(
    it: Iteration, tokenizer: Tokenizer, model: Transformer
) -> None:
    sampler = reader(model, tokenizer, max_num_batched_tokens=8192)
    assess(it, sampler.stream, tokenizer, 8.0, EXPECTED)
    pairs = [pair for pair in read_sealed(it.file("answers.jsonl")) if pair["verdict"] == "kept"]
    lens, shared = [], 0
    for pair in pairs:
        ids = [tokenizer.encode(assess_prompt(pair, question)) for question in ("quality", "following")]
        lens += [len(each) + 2 for each in ids]  # the blank and the "1" of "10"
        same = next(i for i, (a, b) in enumerate(zip(*ids)) if a != b)
        shared += same // 16 * 16
    stats = sampler.stats
    assert stats.num_decode_tokens == len(lens) == 8  # one unused token each, drawn from the prompt's own pass
    assert stats.num_steps <= 3
    assert stats.num_prefill_tokens + stats.num_cached_tokens == sum(lens)
    first = tokenizer.encode(assess_prompt(pairs[0], "quality"))
    intro = next(
        i for i, (a, b) in enumerate(zip(first, tokenizer.encode(assess_prompt(pairs[1], "quality")))) if a != b
    )
    assert stats.num_cached_tokens == shared + 3 * (intro // 16 * 16)


def test_expected_scores_stopped_anywhere(
    tmp_path: Path, it: Iteration, tokenizer: Tokenizer, model: Transformer
) -> None:
    assess(it, reader(model, tokenizer, max_num_seqs=1).stream, tokenizer, 8.0, EXPECTED)
    whole = folder_bytes(it.folder)
    for after in range(0, 8, 3):
        again = written(iteration(tmp_path / f"stopped{after}"))
        sampler = reader(model, tokenizer, max_num_seqs=1)
        with pytest.raises(Stopped):
            assess(again, stopping(sampler, after), tokenizer, 8.0, EXPECTED)
        assess(again, sampler.stream, tokenizer, 8.0, EXPECTED)
        assert folder_bytes(again.folder) == whole
