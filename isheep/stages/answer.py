"""The model answers its own instructions, one answer each: zero-shot (paper §3), or as one of the baselines does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from isheep.artifacts import Journal
from isheep.config import AnswerConfig, settings
from isheep.filter.rules import pair_reason
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.score import part_of
from isheep.stages import Iteration, Row, Stream, kept, read_sealed, sample, verdict
from isheep.stages.caught import Catch
from isheep.stages.instances import instances
from isheep.text.principles import LONG_ANSWERS, NEXT_QUESTION, parse_reply, principle_prompt
from isheep.text.templates import Template
from isheep.text.tokenizer import Tokenizer


class Method(Protocol):
    """How an instruction is put to the model, and what its reply means."""

    @property
    def params(self) -> SamplingParams: ...

    def prompt(self, row: Row) -> str:
        """The text after which the model answers a row {id, instruction, input}."""

    def read(self, row: Row, completion: Completion) -> Row:
        """What the completion adds to the row: output, verdict, reason, and what else the method finds."""


def answer(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, seeds: Path, cfg: AnswerConfig, vector_size: int | None = None
) -> None:
    """Answer each kept instruction, then drop pairs by the method's own rules.

    With `vector_size`, the model's hidden size, perplexities and vectors are caught on the way.

    reads   instructions.jsonl; for the method "instances" also the seed tasks
    writes  answers.jsonl   {id, instruction, input, output, finish_reason, num_output_tokens, verdict, reason}, in the
                            order of the instructions. An instruction too long for the model's context has no output.
                            Of the method "instances" also is_classification, and the input is found with the output;
                            of "principles" also thoughts. `caught` {output_ppl, ...} where measures are caught,
                            null where those of an answer were not
            caught.safetensors  vectors of the rows that were caught, in their order: mean and last, each [N, C] float32
            classes.jsonl   of the method "instances", see `instances`
    """
    file = it.file("instructions.jsonl")
    rows = {f"{row['id']}/answer": _task(row) for row in kept(read_sealed(file))}
    inputs = {"instructions": file}
    if cfg.method == "instances":
        method: Method = instances(it, stream, tokenizer, seeds, list(rows.values()), cfg)
        inputs |= {"seeds": seeds, "classes": it.file("classes.jsonl")}
    else:
        method = _method(it, cfg)
    what = {**settings(cfg), "template": it.template.name, "paper_joins": it.paper_joins}
    vectors, beside = it.file("caught.safetensors"), list[str]()
    if vector_size is not None:
        what["vector_size"], beside = vector_size, [vectors.name]
    with it.journal("answers.jsonl", what, inputs, beside) as journal:
        if not journal.sealed:
            catch = None if vector_size is None else Catch(vectors, vector_size, journal, tokenizer)
            with Progress(f"{it.name} answer", len(rows)) as bar:
                requests = _requests(it, tokenizer, rows, method, journal, catch)
                sample(stream, requests, journal, lambda c: _pair(rows[c.id], c, method, catch), bar)
            if catch is not None:
                catch.save(rows)
            journal.seal(rows)
    part_of(vectors).unlink(missing_ok=True)


def _pair(row: Row, completion: Completion, method: Method, catch: Catch | None) -> Row:
    how = {"finish_reason": completion.finish_reason, "num_output_tokens": len(completion.token_ids)}
    caught = {} if catch is None else {"caught": catch.of(completion)}
    return {**row, **how, **method.read(row, completion), **caught}


def _task(row: Row) -> Row:
    return {name: row[name] for name in ("id", "instruction", "input")}


def _requests(
    it: Iteration, tokenizer: Tokenizer, rows: dict[str, Row], method: Method, journal: Journal, catch: Catch | None
) -> Iterator[Request]:
    """A request for each row that fits the context; the others are journaled as dropped on the way."""
    for key, row in rows.items():
        ids = tokenizer.encode(method.prompt(row))
        if it.fits(ids):
            params = method.params if catch is None else catch.asks(method.params, len(ids))
            yield Request(key, tuple(ids), params, it.adapter)
        elif key not in journal.done:
            nothing = {"output": "", "finish_reason": None, "num_output_tokens": 0}
            caught = {} if catch is None else {"caught": None}
            journal.append(key, [{**row, **nothing, **verdict("exceeds_context"), **caught}])


def _method(it: Iteration, cfg: AnswerConfig) -> Method:
    if cfg.verbose and it.adapter is not None:
        return AtLength(it.asking)
    sampling = SamplingParams(temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens)
    if cfg.method == "principles":
        return Principled(it.asking, replace(sampling, stop=(NEXT_QUESTION,)))
    return ZeroShot(it.asking, replace(sampling, stop=it.template.stop), cfg.option_letter_rule)


@dataclass(frozen=True)
class ZeroShot:
    """The instruction as it stands; the paper's rules for pairs."""

    template: Template
    params: SamplingParams
    option_letter_rule: str

    def prompt(self, row: Row) -> str:
        return self.template.prompt(row["instruction"], row["input"])

    def read(self, row: Row, completion: Completion) -> Row:
        output = {"output": completion.text}
        return {**output, **verdict(pair_reason({**row, **output}, self.option_letter_rule))}


@dataclass(frozen=True)
class Principled:
    """After rules and exemplars: a reply must have thoughts and an answer, of which the answer is the output."""

    template: Template
    params: SamplingParams

    def prompt(self, row: Row) -> str:
        return principle_prompt(self.template.content(row["instruction"], row["input"]))

    def read(self, row: Row, completion: Completion) -> Row:
        found = parse_reply(completion.text)
        if found is None:
            return {"output": completion.text, "thoughts": "", **verdict("marker_missing")}
        thoughts, output = found
        return {"output": output, "thoughts": thoughts, **verdict(None if output else "empty_output")}


@dataclass(frozen=True)
class AtLength:
    """The model that was trained on principled answers is asked for long ones, in its own format."""

    template: Template

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0.3, top_p=0.7, max_tokens=512, stop=self.template.stop)

    def prompt(self, row: Row) -> str:
        task = self.template.content(row["instruction"], row["input"])
        return self.template.chat([{"role": "system", "content": LONG_ANSWERS}, {"role": "user", "content": task}])

    def read(self, row: Row, completion: Completion) -> Row:
        return {"output": completion.text, **verdict(None if completion.text.strip() else "empty_output")}
