"""The model rates its own answers: quality and, of what passes, how well the instruction was followed (paper §4)."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from isheep.artifacts import Journal
from isheep.config import AssessConfig, settings
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, kept, read_sealed, sample, seal_at_once
from isheep.text.prompts import following_prompt, parse_score, quality_prompt
from isheep.text.tokenizer import Tokenizer

# In the order they are asked; only a pair whose score is above the threshold gets the next one.
QUESTIONS: Mapping[str, Callable[[Row, str], str]] = {"quality": quality_prompt, "following": following_prompt}


def assess(it: Iteration, stream: Stream, tokenizer: Tokenizer, threshold: float, cfg: AssessConfig) -> None:
    """Two independent sampled ratings of each pair: quality of all, following of those whose quality passes.

    The prompts are raw text that ends within the rater's own sentence, for base and tuned models alike.

    reads   answers.jsonl
    writes  replies.jsonl   {id, question, reply, finish_reason, num_output_tokens}, one question after the other
            scores.jsonl    {id, quality_score, following_score}; null where nothing was asked or no score could be read
            both in the order of the answers
    """
    file = it.file("answers.jsonl")
    what = {**settings(cfg), "threshold": threshold}
    with (
        it.journal("replies.jsonl", what, {"answers": file}) as replies,
        it.journal("scores.jsonl", what, {"answers": file}) as scores,
    ):
        if scores.sealed:
            return
        pairs = kept(read_sealed(file))
        if not replies.sealed:
            _ask(it, stream, tokenizer, pairs, threshold, cfg, replies)
        found = _read(replies.rows())
        rows = [
            {"id": pair["id"]} | {f"{question}_score": found.get((pair["id"], question)) for question in QUESTIONS}
            for pair in pairs
        ]
        seal_at_once(scores, rows)


def _ask(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, pairs: list[Row], threshold: float, cfg: AssessConfig,
    journal: Journal,
) -> None:  # fmt: skip
    """Journal and seal the replies to one question after the other."""

    def reply(completion: Completion) -> Row:
        pair_id, _, question = completion.id.rpartition("/")
        how = {"finish_reason": completion.finish_reason, "num_output_tokens": len(completion.token_ids)}
        return {"id": pair_id, "question": question, "reply": completion.text, **how}

    order, asked = [], pairs
    for question in QUESTIONS:
        with Progress(f"{it.name} assess {question}", len(asked)) as bar:
            sample(stream, _requests(it, tokenizer, asked, question, cfg), journal, reply, bar)
        replied = [pair for pair in asked if f"{pair['id']}/{question}" in journal.done]
        order += [f"{pair['id']}/{question}" for pair in replied]
        scores = _read(row for key in order for row in journal.done[key])
        asked = [pair for pair in replied if _passes(scores[pair["id"], question], threshold)]
    journal.seal(order)


def _requests(
    it: Iteration, tokenizer: Tokenizer, pairs: list[Row], question: str, cfg: AssessConfig
) -> Iterator[Request]:
    """The question about each pair that fits the context; one that does not gets no reply."""
    params = SamplingParams(temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens)
    adapter = it.adapter if cfg.assessor == "current" else None
    for pair in pairs:
        ids = tokenizer.encode(QUESTIONS[question](pair, cfg.prompt))
        if it.fits(ids):
            yield Request(f"{pair['id']}/{question}", tuple(ids), params, adapter)


def _passes(score: int | None, threshold: float) -> bool:
    return score is not None and score > threshold


def _read(replies: Iterable[Row]) -> dict[tuple[str, str], int | None]:
    """(id, question) -> score; None where the reply holds none."""
    return {(row["id"], row["question"]): parse_score(row["reply"]) for row in replies}
