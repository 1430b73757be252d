"""The model rates its own answers: quality and, of what passes, how well the instruction was followed (paper §4)."""

from collections.abc import Iterable, Iterator

from isheep.artifacts import Journal
from isheep.config import ASSESS_LEVELS, AssessConfig, settings
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, kept, read_sealed, sample, seal_at_once
from isheep.text.expected import score_tokens
from isheep.text.prompts import LEAD_IN, QUESTIONS, assess_prompt, parse_score, questions
from isheep.text.tokenizer import Tokenizer

NEAR = 32  # pairs that are asked one question before the next, while the cache still has them
SCORES = ASSESS_LEVELS["both"]  # a column of scores.jsonl each, whatever the level


def assess(it: Iteration, stream: Stream, tokenizer: Tokenizer, threshold: float, cfg: AssessConfig) -> None:
    """Independent ratings of each pair, as many as the level needs: quality of all, following of those that pass it.

    At level following that is asked of all pairs; the prompt icl asks for one score instead, which serves as both. The
    prompts are raw text that ends within the rater's own sentence, for base and tuned models alike. Expected scores are
    read off that text's own pass: both of a pair at nearly the same time, so that the second finds it in the cache.

    reads   answers.jsonl
    writes  replies.jsonl   {id, question, score, reply, finish_reason, num_output_tokens}, by question; where scores
                            are expected ones {id, question, score, mass, shares}: how probable the strings of all
                            scores were, and the share of each
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
            if cfg.score_decoding == "expected":
                _ask_at_once(it, stream, tokenizer, pairs, cfg, replies)
            else:
                _ask_in_turn(it, stream, tokenizer, pairs, threshold, cfg, replies)
        found = _scores(replies.rows())
        source = {name: question for question in _questions(cfg) for name in QUESTIONS[question].scores}
        rows = [
            {"id": pair["id"]} | {f"{name}_score": found.get((pair["id"], source.get(name, ""))) for name in SCORES}
            for pair in pairs
        ]
        seal_at_once(scores, rows)


def _ask_in_turn(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, pairs: list[Row], threshold: float, cfg: AssessConfig,
    journal: Journal,
) -> None:  # fmt: skip
    """Journal and seal the replies to one question after the other, the next of those that passed."""

    def reply(completion: Completion) -> Row:
        how = {"finish_reason": completion.finish_reason, "num_output_tokens": len(completion.token_ids)}
        return {**_about(completion), "score": parse_score(completion.text), "reply": completion.text, **how}

    temperature = 0.0 if cfg.score_decoding == "greedy" else cfg.temperature
    params = SamplingParams(temperature=temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens)
    order, asked = [], pairs
    for question in _questions(cfg):
        with Progress(f"{it.name} assess {question}", len(asked)) as bar:
            asks = ((pair, question) for pair in asked)
            sample(stream, _requests(it, tokenizer, asks, cfg, params), journal, reply, bar)
        order += _replied(asked, question, journal)
        scores = _scores(row for key in order for row in journal.done[key])
        asked = [pair for pair in asked if _passes(scores.get((pair["id"], question)), threshold)]
    journal.seal(order)


def _ask_at_once(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, pairs: list[Row], cfg: AssessConfig, journal: Journal
) -> None:
    """Journal and seal the expected scores of all questions about a few pairs, then the next few, whatever passes."""
    tokens, asked = score_tokens(tokenizer, LEAD_IN), _questions(cfg)

    def read(completion: Completion) -> Row:
        entries = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
        score, mass, shares = tokens.read([entry["asked"] for entry in entries])
        return {**_about(completion), "score": round(score, 4), "mass": mass, "shares": shares}

    params = SamplingParams(
        temperature=0, max_tokens=1, logprobs=0, logprob_token_ids=tokens.token_ids,
        num_prompt_logprobs=len(tokens.stem),
    )  # fmt: skip
    with Progress(f"{it.name} assess {', '.join(asked)}", len(asked) * len(pairs)) as bar:
        near = (pairs[at : at + NEAR] for at in range(0, len(pairs), NEAR))
        asks = ((pair, question) for some in near for question in asked for pair in some)
        requests = _requests(it, tokenizer, asks, cfg, params, tokens.blank + tokens.stem)
        sample(stream, requests, journal, read, bar)
    journal.seal(key for question in asked for key in _replied(pairs, question, journal))


def _about(completion: Completion) -> Row:
    pair_id, _, question = completion.id.rpartition("/")
    return {"id": pair_id, "question": question}


def _replied(pairs: list[Row], question: str, journal: Journal) -> list[str]:
    """The journal's keys of the pairs whose question fitted the context."""
    return [key for key in (f"{pair['id']}/{question}" for pair in pairs) if key in journal.done]


def _questions(cfg: AssessConfig) -> list[str]:
    return questions(cfg.prompt, ASSESS_LEVELS[cfg.level])


def _requests(
    it: Iteration, tokenizer: Tokenizer, asks: Iterable[tuple[Row, str]], cfg: AssessConfig, params: SamplingParams,
    end: tuple[int, ...] = (),
) -> Iterator[Request]:  # fmt: skip
    """Each (pair, question) that fits the context, with the tokens `end` behind it; one that does not gets no reply."""
    adapter = it.adapter if cfg.assessor == "current" else None
    for pair, question in asks:
        prompt = assess_prompt(pair, question, cfg.prompt, " " if it.paper_joins else "\n")
        ids = (*tokenizer.encode(prompt), *end)
        if it.fits(ids):
            yield Request(f"{pair['id']}/{question}", ids, params, adapter)


def _passes(score: float | None, threshold: float) -> bool:
    return score is not None and score > threshold


def _scores(replies: Iterable[Row]) -> dict[tuple[str, str], float | None]:
    """(id, question) -> score; None where the reply holds none."""
    return {(row["id"], row["question"]): row["score"] for row in replies}
