"""New instructions: the model is shown some tasks, or topics, and goes on with tasks of its own (paper §2).

How a prompt comes about and is read is a method's affair; lists.py and on_topics.py have them. Prompt k follows from
(seed, iteration, k) and, where the model is shown its own tasks, from what came of the rounds of prompts before.

Completions are kept as they finish, in any order, and read in the order of their prompts: rules and ROUGE see the same
items in the same order however the sampler batches and wherever a run was stopped.
"""

import math
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from isheep.artifacts import Journal
from isheep.config import InstructConfig, UserError, settings
from isheep.filter.rouge import RougePool
from isheep.filter.rules import instruction_reason
from isheep.log import Progress, log
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import KEPT, Iteration, Row, Stream, kept, read_sealed, seal_at_once, verdict
from isheep.stages.lists import LISTS
from isheep.stages.on_topics import on_topics
from isheep.text.seeds import SeedTask, load_seeds
from isheep.text.tokenizer import Tokenizer

NUM_MOST_SIMILAR = 10
CALL_PROMPTS, CALL_KEPT = 32, 100  # of the paper's scripts: prompts are taken 32 at a time until so many are kept


class Method(Protocol):
    """How prompts come about, and what is read from their completions. They are raw text for every model."""

    round_len: float  # prompts of a round; they may show what was kept in rounds before

    @property
    def num_prompts(self) -> float:
        """How many there are."""

    @property
    def params(self) -> SamplingParams: ...

    def prompt(self, k: int, before: Sequence[Row]) -> tuple[str, list[str]]:
        """Prompt k and the ids of what it shows; `before` are the kept rows {id, instruction} of the rounds before."""

    def read(self, text: str, is_cut: bool) -> tuple[list[dict[str, str]], int]:
        """The items {instruction, input} of a completion, and how many were malformed."""


def instruct(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, seeds: Path, earlier: Sequence[Path], cfg: InstructConfig
) -> None:
    """Sample prompts until `data_size` instructions are kept, or all prompts there are, or `max_prompts`, are read.

    reads   the seed tasks; `earlier`: instructions.jsonl of the earlier iterations, whose kept rows are in the pool
    writes  completions.jsonl   {prompt, examples, text, finish_reason, num_output_tokens, num_items, num_malformed}
            instructions.jsonl  {id, instruction, input, verdict, reason, mean_similarity, most_similar [[id, F], ...]},
                                the dropped ones too; the similarities where the rules did not drop it before
            both in the order of the prompts
            topics.jsonl        of the method "topics", see `on_topics`
    """
    tasks = read_tasks(seeds, cfg.num_in_context)
    inputs = {"seeds": seeds} | {path.parent.name: path for path in earlier}
    if cfg.method == "topics":
        method: Method = on_topics(it, stream, tokenizer, cfg)
        inputs["topics"] = it.file("topics.jsonl")
    else:
        method = LISTS[cfg.method](f"{it.seed}/{it.name}", tasks, cfg)
    with (
        it.journal("completions.jsonl", settings(cfg), inputs) as completions,
        it.journal("instructions.jsonl", settings(cfg), inputs) as instructions,
    ):
        if instructions.sealed:
            return
        reader = Reader(it, Pool(tasks, earlier, cfg.dedup_pool == "call"), method, instructions, cfg)
        _read_all(reader, stream, tokenizer, completions)
        used = [str(k) for k in range(reader.num_prompts)]
        if not completions.sealed:
            completions.seal(used)
        instructions.seal(used)


def take_again(it: Iteration, before: Path) -> None:
    """The instructions that an earlier iteration kept, in place of new ones.

    reads   `before`: instructions.jsonl of the earlier iteration
    writes  completions.jsonl, which is empty; instructions.jsonl, its rows under ids of this iteration
    """
    inputs = {before.parent.name: before}
    with (
        it.journal("completions.jsonl", {"again": True}, inputs) as completions,
        it.journal("instructions.jsonl", {"again": True}, inputs) as instructions,
    ):
        if not completions.sealed:
            seal_at_once(completions, [])
        if not instructions.sealed:
            rows = kept(read_sealed(before))
            seal_at_once(instructions, [row | {"id": f"{it.name}/{row['id'].partition('/')[2]}"} for row in rows])


def read_tasks(seeds: Path, num_in_context: int) -> list[SeedTask]:
    """The usable seed tasks; UserError where they are too few for one prompt."""
    tasks, skipped = load_seeds(seeds)
    if skipped:
        log.warning("%s: skipped %d malformed rows, %d seed tasks are left", seeds, skipped, len(tasks))
    if len(tasks) < num_in_context:
        raise UserError(
            f"{seeds} has {len(tasks)} seed tasks, but each prompt shows {num_in_context}: add some, or lower "
            "instruct.num_in_context."
        )
    return tasks


def _read_all(reader: "Reader", stream: Stream, tokenizer: Tokenizer, completions: Journal) -> None:
    """Give the reader one prompt's completion after the other, round after round."""
    rows = completions.rows() if completions.sealed else [row for rows in completions.done.values() for row in rows]
    known = {row["prompt"]: row for row in rows}
    with Progress(f"{reader.it.name} instruct", reader.cfg.data_size, "kept") as bar:
        bar.update(reader.num_kept)
        while not reader.finished:
            _read_round(reader, stream, tokenizer, completions, known, bar)
    if reader.num_kept < reader.cfg.data_size:
        log.warning(
            "%s: %d of %d instructions after all %d prompts; going on with these",
            *(reader.it.name, reader.num_kept, reader.cfg.data_size, reader.num_prompts),
        )


def _read_round(
    reader: "Reader", stream: Stream, tokenizer: Tokenizer, completions: Journal, known: dict[int, Row], bar: Progress
) -> None:
    """Those completions that are known, then new ones, which become known."""
    now = reader.round()
    with closing(stream(_requests(reader, tokenizer, now, skip=known))) as arriving:  # type: ignore[type-var]
        while not reader.finished and reader.num_prompts < now.end:
            k = reader.num_prompts
            if k in known:
                bar.update(reader.read(known[k]), prompts=k + 1)
            else:
                row = _completion_row(reader.method, now, next(arriving))
                completions.append(str(row["prompt"]), [row])
                known[row["prompt"]] = row


class Round(NamedTuple):
    """Prompts that are sampled together."""

    start: int
    end: float
    before: list[Row]  # what was kept in the rounds before


def _requests(reader: "Reader", tokenizer: Tokenizer, now: Round, skip: Container[int]) -> Iterator[Request]:
    """A request for each prompt of the round but those in `skip`; without end where the round has none."""
    it, method = reader.it, reader.method
    for k in count(now.start):
        if k >= now.end:
            return
        if k not in skip:
            ids = tokenizer.encode(method.prompt(k, now.before)[0])
            yield Request(f"{it.name}/instruct/{k}", tuple(ids), method.params, it.adapter)


def _completion_row(method: Method, now: Round, completion: Completion) -> Row:
    """A completion as completions.jsonl has it."""
    k = int(completion.id.rpartition("/")[2])
    items, num_malformed = method.read(completion.text, completion.finish_reason == "length")
    return {
        "prompt": k,
        "examples": method.prompt(k, now.before)[1],
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_output_tokens": len(completion.token_ids),
        "num_items": len(items),
        "num_malformed": num_malformed,
    }


class Pool:
    """What a new instruction must differ from: the seeds and all that was ever kept. One pool over all iterations.

    As published; `per_call` is as the paper's scripts ran, which compared with the seeds and the current call only: its
    later data sets hold some two hundred duplicates each.
    """

    def __init__(self, tasks: Sequence[SeedTask], earlier: Sequence[Path], per_call: bool = False) -> None:
        self._tasks, self._per_call = tasks, per_call
        self._start()
        for path in () if per_call else earlier:
            for row in kept(read_sealed(path)):
                self.add(row["id"], row["instruction"])

    def _start(self) -> None:
        """The seeds alone."""
        self._texts, self._ids, self._num_prompts = RougePool(), list[str](), 0
        for task in self._tasks:
            self.add(task.id, task.instruction)

    def add(self, row_id: str, instruction: str) -> None:
        self._texts.add(instruction)
        self._ids.append(row_id)

    def end_prompt(self) -> None:
        """A prompt's items are all judged. A call that ends with it leaves nothing to the next one."""
        self._num_prompts += 1
        num_kept = len(self._ids) - len(self._tasks)
        if self._per_call and self._num_prompts % CALL_PROMPTS == 0 and num_kept >= CALL_KEPT:
            self._start()

    def similarities(self, instruction: str) -> np.ndarray:
        """ROUGE-L F of an instruction to each text of the pool."""
        return self._texts.similarities(instruction)

    def report(self, similarities: np.ndarray) -> Row:
        """{mean_similarity, most_similar [[id, F], ...], the most similar first}, rounded for a reader."""
        nearest = np.argsort(-similarities, kind="stable")[:NUM_MOST_SIMILAR]
        return {
            "mean_similarity": round(float(similarities.mean()), 4),
            "most_similar": [[self._ids[i], round(float(similarities[i]), 4)] for i in nearest],
        }


class Reader:
    """Turns completions, in prompt order, into judged instructions; goes on where its journal ends."""

    def __init__(self, it: Iteration, pool: Pool, method: Method, journal: Journal, cfg: InstructConfig) -> None:
        self.it, self.pool, self.method, self.journal, self.cfg = it, pool, method, journal, cfg
        self._limit = min(method.num_prompts, math.inf if cfg.max_prompts is None else cfg.max_prompts)
        self._kept: list[tuple[int, Row]] = []  # with the prompt of each
        for k, rows in enumerate(journal.done.values()):
            for row in kept(rows):
                self._keep(k, row)
            pool.end_prompt()

    @property
    def num_prompts(self) -> int:
        """How many prompts are read: also the number of the next one."""
        return len(self.journal.done)

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def finished(self) -> bool:
        return self.num_kept >= self.cfg.data_size or self.num_prompts >= self._limit

    def round(self) -> Round:
        """That of the next prompt."""
        length = self.method.round_len
        start = 0 if math.isinf(length) else int(self.num_prompts // length * length)
        return Round(start, min(start + length, self._limit), [row for k, row in self._kept if k < start])

    def read(self, completion: Row) -> int:
        """Journal the items of the next prompt's completion -> how many were kept. What is beyond data_size is left."""
        k, before, rows = self.num_prompts, self.num_kept, []
        items, _ = self.method.read(completion["text"], completion["finish_reason"] == "length")
        for j, item in enumerate(items):
            row = {"id": f"{self.it.name}/{k}.{j}", **item, **self._judge(item)}
            rows.append(row)
            if row["verdict"] == KEPT:
                self._keep(k, row)
            if self.num_kept == self.cfg.data_size:
                break
        self.journal.append(str(k), rows)
        self.pool.end_prompt()
        return self.num_kept - before

    def _keep(self, k: int, row: Row) -> None:
        self.pool.add(row["id"], row["instruction"])
        self._kept.append((k, row))

    def _judge(self, item: dict[str, str]) -> Row:
        """verdict, reason and the similarities of {instruction, input}."""
        reason = instruction_reason(item, self.cfg)
        if reason is not None:
            return {**verdict(reason), "mean_similarity": None, "most_similar": []}
        similarities = self.pool.similarities(item["instruction"])
        reason = "similar" if similarities.max() > self.cfg.rouge_threshold else None
        return {**verdict(reason), **self.pool.report(similarities)}
