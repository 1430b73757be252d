"""Answers as Self-Instruct (2022) finds them: is the task a classification, and then an instance {input, output} of it.

For a classification the output comes first, for anything else the input. A completion may hold several instances; the
first that passes the rules is taken, because a row of the ledger is an instruction.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isheep.artifacts import Journal
from isheep.config import AnswerConfig
from isheep.filter.rules import instance_reason
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, sample, verdict
from isheep.text.seeds import SeedTask, load_seeds
from isheep.text.self_instruct import (
    NEXT_TASK,
    classification_prompt,
    instance_prompt,
    parse_classification,
    parse_instances,
)
from isheep.text.tokenizer import Tokenizer

NUM_CLASSIFIED = 8  # seed tasks of either kind that are shown with what they are
NUM_WITH_INSTANCE = 6  # seed tasks of one kind that are shown with an instance
YES_OR_NO = SamplingParams(temperature=0.0, max_tokens=3, stop=("\n",))


@dataclass(frozen=True)
class Shown:
    """The seed tasks in the prompts of an iteration: the same in all, so that what comes before a task is shared."""

    classified: list[SeedTask]
    with_instance: Mapping[bool, list[SeedTask]]  # is it a classification? -> tasks of that kind


@dataclass(frozen=True)
class Instances:
    """How an instance of a task is asked for and read; see `isheep.stages.answer.Method`."""

    shown: Shown
    classes: Mapping[str, bool]  # row id -> is it a classification?
    params: SamplingParams

    def prompt(self, row: Row) -> str:
        kind = self.classes[row["id"]]
        return instance_prompt(row["instruction"], self.shown.with_instance[kind], output_first=kind)

    def read(self, row: Row, completion: Completion) -> Row:
        """The first instance that passes, or the first of all with what is wrong with it."""
        kind = self.classes[row["id"]]
        found = parse_instances(completion.text, kind, is_cut=completion.finish_reason == "length")
        judged = [{**each, **verdict(instance_reason(each, found))} for each in found]
        judged.append({"input": "", "output": "", **verdict("no_instance")})
        chosen = next((each for each in judged if each["reason"] is None), judged[0])
        return {**chosen, "is_classification": kind}


def instances(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, seeds: Path, rows: Sequence[Row], cfg: AnswerConfig
) -> Instances:
    """Find out which of the rows {id, instruction} are classifications: greedily, the first step of the method.

    reads   instructions.jsonl, whose rows these are, and the seed tasks
    writes  classes.jsonl   {id, reply, is_classification}, in the order of the rows; one that does not fit the model's
                            context has no reply, and counts as none
    """
    shown = draw_shown(load_seeds(seeds)[0], f"{it.seed}/{it.name}/instances")
    inputs = {"instructions": it.file("instructions.jsonl"), "seeds": seeds}
    what = {"max_tokens": YES_OR_NO.max_tokens, "num_classified": NUM_CLASSIFIED}
    with it.journal("classes.jsonl", what, inputs) as journal:
        if not journal.sealed:
            _classify(it, stream, tokenizer, shown.classified, rows, journal)
        classes = {row["id"]: row["is_classification"] for row in journal.rows()}
    params = SamplingParams(temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens, stop=(NEXT_TASK,))
    return Instances(shown, classes, params)


def draw_shown(tasks: Sequence[SeedTask], key: str) -> Shown:
    """What is shown follows from `key`. Where there is no task of a kind, any stand in."""
    draw = random.Random(key)

    def some(number: int, *kinds: bool) -> list[SeedTask]:
        fitting = [task for task in tasks if task.is_classification in kinds]
        return draw.sample(fitting, min(number, len(fitting)))

    classified = some(NUM_CLASSIFIED, True) + some(NUM_CLASSIFIED, False)
    draw.shuffle(classified)
    with_instance = {kind: some(NUM_WITH_INSTANCE, kind) or some(NUM_WITH_INSTANCE, not kind) for kind in (True, False)}
    return Shown(classified, with_instance)


def _classify(
    it: Iteration,
    stream: Stream,
    tokenizer: Tokenizer,
    shown: Sequence[SeedTask],
    rows: Sequence[Row],
    journal: Journal,
) -> None:
    """Journal and seal the replies."""
    of = {f"{row['id']}/class": row for row in rows}

    def requests() -> Iterator[Request]:
        for key, row in of.items():
            ids = tokenizer.encode(classification_prompt(row["instruction"], shown))
            if it.fits(ids):
                yield Request(key, tuple(ids), YES_OR_NO, it.adapter)
            elif key not in journal.done:
                journal.append(key, [{"id": row["id"], "reply": None, "is_classification": False}])

    def reply(completion: Completion) -> Row:
        kind = parse_classification(completion.text)
        return {"id": of[completion.id]["id"], "reply": completion.text, "is_classification": kind}

    with Progress(f"{it.name} classify", len(of)) as bar:
        sample(stream, requests(), journal, reply, bar)
    journal.seal(of)
