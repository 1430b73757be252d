"""The model answers its own instructions, zero-shot, one answer each (paper §3)."""

from collections.abc import Iterator
from dataclasses import replace

from isheep.artifacts import Journal
from isheep.config import AnswerConfig, settings
from isheep.filter.rules import pair_reason
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, kept, read_sealed, sample, verdict
from isheep.text.tokenizer import Tokenizer


def answer(it: Iteration, stream: Stream, tokenizer: Tokenizer, cfg: AnswerConfig) -> None:
    """Answer each kept instruction, then drop pairs by rule.

    reads   instructions.jsonl
    writes  answers.jsonl   {id, instruction, input, output, finish_reason, num_output_tokens, verdict, reason}, in the
                            order of the instructions. An instruction too long for the model's context has no output.
    """
    file = it.file("instructions.jsonl")
    what = {**settings(cfg), "template": it.template.name, "paper_joins": it.paper_joins}
    with it.journal("answers.jsonl", what, {"instructions": file}) as journal:
        if journal.sealed:
            return
        rows = {f"{row['id']}/answer": _task(row) for row in kept(read_sealed(file))}

        def pair(completion: Completion) -> Row:
            answered = {**rows[completion.id], "output": completion.text}
            how = {"finish_reason": completion.finish_reason, "num_output_tokens": len(completion.token_ids)}
            return {**answered, **how, **verdict(pair_reason(answered, cfg.option_letter_rule))}

        with Progress(f"{it.name} answer", len(rows)) as bar:
            sample(stream, _requests(it, tokenizer, rows, cfg, journal), journal, pair, bar)
        journal.seal(rows)


def _task(row: Row) -> Row:
    return {name: row[name] for name in ("id", "instruction", "input")}


def _requests(
    it: Iteration, tokenizer: Tokenizer, rows: dict[str, Row], cfg: AnswerConfig, journal: Journal
) -> Iterator[Request]:
    """A request for each row that fits the context; the others are journaled as dropped on the way."""
    params = SamplingParams(
        temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens, stop=it.template.stop
    )
    template = replace(it.template, joint="") if it.paper_joins else it.template
    for key, row in rows.items():
        ids = tokenizer.encode(template.prompt(row["instruction"], row["input"]))
        if it.fits(ids):
            yield Request(key, tuple(ids), params, it.adapter)
        elif key not in journal.done:
            nothing = {"output": "", "finish_reason": None, "num_output_tokens": 0}
            journal.append(key, [{**row, **nothing, **verdict("exceeds_context")}])
