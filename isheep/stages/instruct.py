"""New instructions: a few random seed tasks are shown to the model, which goes on with tasks of its own (paper §2).

Prompt k shows seeds drawn by a generator keyed by (seed, iteration, k). Completions are kept as they finish, in any
order, and read in the order of their prompts: rules and ROUGE see the same items in the same order however the sampler
batches and wherever a run was stopped.
"""

import random
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from isheep.artifacts import Journal
from isheep.config import InstructConfig, UserError, settings
from isheep.filter.rouge import RougePool
from isheep.filter.rules import instruction_reason
from isheep.log import Progress, log
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import KEPT, Iteration, Row, Stream, kept, read_sealed, verdict
from isheep.text.prompts import instruction_prompt, parse_instructions
from isheep.text.seeds import SeedTask, load_seeds
from isheep.text.tokenizer import Tokenizer

NUM_MOST_SIMILAR = 10
CALL_PROMPTS, CALL_KEPT = 32, 100  # of the paper's scripts: prompts are taken 32 at a time until so many are kept


def instruct(
    it: Iteration, stream: Stream, tokenizer: Tokenizer, seeds: Path, earlier: Sequence[Path], cfg: InstructConfig
) -> None:
    """Sample prompts until `data_size` instructions are kept, or `max_prompts` prompts are read.

    reads   the seed tasks; `earlier`: instructions.jsonl of the earlier iterations, whose kept rows are in the pool
    writes  completions.jsonl   {prompt, examples, text, finish_reason, num_output_tokens, num_items, num_malformed}
            instructions.jsonl  {id, instruction, input, verdict, reason, mean_similarity, most_similar [[id, F], ...]},
                                the dropped ones too; the similarities where the rules did not drop it before
            both in the order of the prompts
    """
    tasks = read_tasks(seeds, cfg.num_in_context)
    inputs = {"seeds": seeds} | {path.parent.name: path for path in earlier}
    with (
        it.journal("completions.jsonl", settings(cfg), inputs) as completions,
        it.journal("instructions.jsonl", settings(cfg), inputs) as instructions,
    ):
        if instructions.sealed:
            return
        reader = Reader(it, Pool(tasks, earlier, cfg.dedup_pool == "call"), instructions, cfg)
        _read_all(reader, Prompts(it, tokenizer, tasks, cfg), stream, completions)
        used = [str(k) for k in range(reader.num_prompts)]
        if not completions.sealed:
            completions.seal(used)
        instructions.seal(used)


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


def _read_all(reader: "Reader", prompts: "Prompts", stream: Stream, completions: Journal) -> None:
    """Give the reader one prompt's completion after the other: those that are there, then new ones."""
    rows = completions.rows() if completions.sealed else [row for rows in completions.done.values() for row in rows]
    texts: dict[int, str] = {row["prompt"]: row["text"] for row in rows}
    with (
        closing(stream(prompts.requests(skip=texts))) as arriving,  # type: ignore[type-var]
        Progress(f"{prompts.it.name} instruct", reader.cfg.data_size, "kept") as bar,
    ):
        bar.update(reader.num_kept)
        while not reader.finished:
            k = reader.num_prompts
            if k in texts:
                bar.update(reader.read(texts[k]), prompts=k + 1)
            else:
                row = prompts.row(next(arriving))
                completions.append(str(row["prompt"]), [row])
                texts[row["prompt"]] = row["text"]
    if reader.num_kept < reader.cfg.data_size:
        log.warning(
            "%s: %d of %d instructions after max_prompts = %d; going on with these",
            *(prompts.it.name, reader.num_kept, reader.cfg.data_size, reader.num_prompts),
        )


@dataclass(frozen=True)
class Prompts:
    """The prompts k = 0, 1, 2, ... of one iteration: raw text for every model, never its chat format."""

    it: Iteration
    tokenizer: Tokenizer
    tasks: Sequence[SeedTask]
    cfg: InstructConfig

    def examples(self, k: int) -> list[SeedTask]:
        """The seed tasks that prompt k shows."""
        return random.Random(f"{self.it.seed}/{self.it.name}/{k}").sample(self.tasks, self.cfg.num_in_context)

    def requests(self, skip: Container[int]) -> Iterator[Request]:
        """A request for each prompt but those in `skip`; without end where there is no max_prompts."""
        cfg = self.cfg
        params = SamplingParams(temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens, stop=cfg.stop)
        for k in count() if cfg.max_prompts is None else range(cfg.max_prompts):
            if k not in skip:
                ids = self.tokenizer.encode(instruction_prompt(self.examples(k)))
                yield Request(f"{self.it.name}/instruct/{k}", tuple(ids), params, self.it.adapter)

    def row(self, completion: Completion) -> Row:
        """A completion as completions.jsonl has it."""
        k = int(completion.id.rpartition("/")[2])
        items, num_malformed = parse_instructions(completion.text, self.cfg.num_in_context + 1)
        return {
            "prompt": k,
            "examples": [task.id for task in self.examples(k)],
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

    def __init__(self, it: Iteration, pool: Pool, journal: Journal, cfg: InstructConfig) -> None:
        self.it, self.pool, self.journal, self.cfg = it, pool, journal, cfg
        self.num_kept = 0
        for rows in journal.done.values():
            for row in kept(rows):
                self._keep(row)
            pool.end_prompt()

    @property
    def num_prompts(self) -> int:
        """How many prompts are read: also the number of the next one."""
        return len(self.journal.done)

    @property
    def finished(self) -> bool:
        return self.num_kept >= self.cfg.data_size or self.num_prompts == self.cfg.max_prompts

    def read(self, text: str) -> int:
        """Journal the items of the next prompt's completion -> how many were kept. What is beyond data_size is left."""
        before, rows = self.num_kept, []
        items, _ = parse_instructions(text, self.cfg.num_in_context + 1)
        for j, item in enumerate(items):
            row = {"id": f"{self.it.name}/{self.num_prompts}.{j}", **item, **self._judge(item)}
            rows.append(row)
            if row["verdict"] == KEPT:
                self._keep(row)
            if self.num_kept == self.cfg.data_size:
                break
        self.journal.append(str(self.num_prompts), rows)
        self.pool.end_prompt()
        return self.num_kept - before

    def _keep(self, row: Row) -> None:
        self.pool.add(row["id"], row["instruction"])
        self.num_kept += 1

    def _judge(self, item: dict[str, str]) -> Row:
        """verdict, reason and the similarities of {instruction, input}."""
        reason = instruction_reason(item, self.cfg)
        if reason is not None:
            return {**verdict(reason), "mean_similarity": None, "most_similar": []}
        similarities = self.pool.similarities(item["instruction"])
        reason = "similar" if similarities.max() > self.cfg.rouge_threshold else None
        return {**verdict(reason), **self.pool.report(similarities)}
