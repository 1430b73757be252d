"""The model rates its own answers: quality and, of what passes, how well the instruction was followed (paper §4)."""

from collections.abc import Iterable, Iterator

from isheep.artifacts import Journal
from isheep.config import ASSESS_LEVELS, AssessConfig, settings
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, kept, read_sealed, sample, seal_at_once
from isheep.text.prompts import QUESTIONS, assess_prompt, parse_score, questions
from isheep.text.tokenizer import Tokenizer

SCORES = ASSESS_LEVELS["both"]  # a column of scores.jsonl each, whatever the level


def assess(it: Iteration, stream: Stream, tokenizer: Tokenizer, threshold: float, cfg: AssessConfig) -> None:
    """Independent ratings of each pair, as many as the level needs: quality of all, following of those that pass it.

    At level following that is asked of all pairs; the prompt icl asks for one score instead, which serves as both. The
    prompts are raw text that ends within the rater's own sentence, for base and tuned models alike.

    reads   answers.jsonl
    writes  replies.jsonl   {id, question, reply, finish_reason, num_output_tokens}, one question after the other
            scores.jsonl    {id, quality_score, following_score}; null where nothing was asked or no score could be read
            both in the order of the answers
    """
    file = it.file("answers.jsonl")
    what = {**settings(cfg), "threshold": threshold, "paper_joins": it.paper_joins}
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
        source = {name: question for question in _questions(cfg) for name in QUESTIONS[question].scores}
        rows = [
            {"id": pair["id"]} | {f"{name}_score": found.get((pair["id"], source.get(name, ""))) for name in SCORES}
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
    for question in _questions(cfg):
        with Progress(f"{it.name} assess {question}", len(asked)) as bar:
            sample(stream, _requests(it, tokenizer, asked, question, cfg), journal, reply, bar)
        replied = [pair for pair in asked if f"{pair['id']}/{question}" in journal.done]
        order += [f"{pair['id']}/{question}" for pair in replied]
        scores = _read(row for key in order for row in journal.done[key])
        asked = [pair for pair in replied if _passes(scores[pair["id"], question], threshold)]
    journal.seal(order)


def _questions(cfg: AssessConfig) -> list[str]:
    return questions(cfg.prompt, ASSESS_LEVELS[cfg.level])


def _requests(
    it: Iteration, tokenizer: Tokenizer, pairs: list[Row], question: str, cfg: AssessConfig
) -> Iterator[Request]:
    """The question about each pair that fits the context; one that does not gets no reply."""
    temperature = 0.0 if cfg.score_decoding == "greedy" else cfg.temperature
    params = SamplingParams(temperature=temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens)
    adapter = it.adapter if cfg.assessor == "current" else None
    for pair in pairs:
        ids = tokenizer.encode(assess_prompt(pair, question, cfg.prompt, " " if it.paper_joins else "\n"))
        if it.fits(ids):
            yield Request(f"{pair['id']}/{question}", tuple(ids), params, adapter)


def _passes(score: int | None, threshold: float) -> bool:
    return score is not None and score > threshold


def _read(replies: Iterable[Row]) -> dict[tuple[str, str], int | None]:
    """(id, question) -> score; None where the reply holds none."""
    return {(row["id"], row["question"]): parse_score(row["reply"]) for row in replies}
