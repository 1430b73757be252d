"""The stages of one iteration: plain functions from files to files, each in a module of its own.

instruct -> answer -> assess -> measure -> select -> train. A stage keeps its results in a journal (artifacts.py), so
it can be stopped at any moment and finds what is done when it is called again. What all of them share is here.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from isheep.artifacts import Journal
from isheep.log import Progress
from isheep.sampler.request import Completion, Request
from isheep.text.templates import Template

Row = dict[str, Any]
# Requests, pulled as there is room -> completions as they finish; closing it aborts the rest. `Sampler.stream` is one.
Stream = Callable[[Iterable[Request]], Iterator[Completion]]

KEPT, DROPPED = "kept", "dropped"


@dataclass(frozen=True)
class Iteration:
    """One turn of the loop: where its files are, and which model works in it.

    The model of iteration t is the base with `adapter`, trained in iteration t - 1; in the first it is the base alone.
    `template` is how that model is asked: raw text for the base, its chat format once it is tuned.
    """

    number: int  # 1, 2, ...
    folder: Path
    seed: int
    model: str
    dtype: str
    context_len: int
    template: Template
    adapter: str | None = None
    adapter_folder: Path | None = None
    paper_joins: bool = False  # instruction and input are joined as the paper ran it: by "" to answer, " " to rate
    others: tuple[
        Path, ...
    ] = ()  # this iteration's folders in other runs, whose results are taken where they are the same

    @property
    def name(self) -> str:
        """'iter1': its folder, the prefix of its ids, and the adapter that is trained in it."""
        return f"iter{self.number}"

    @property
    def asking(self) -> Template:
        """How instruction and input become the prompt of an answer."""
        return replace(self.template, joint="") if self.paper_joins else self.template

    def file(self, name: str) -> Path:
        return self.folder / name

    def journal(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, Path], beside: Sequence[str] = ()
    ) -> Journal:
        """The journal of one result, which is written with the files `beside`.

        Model and seed, which every result depends on, are in its fingerprint.
        """
        who = {"model": self.model, "dtype": self.dtype, "seed": self.seed, "adapter": self.adapter}
        inputs = dict(inputs)
        if self.adapter_folder is not None:
            inputs["adapter"] = self.adapter_folder / "adapter_model.safetensors"
        return Journal(self.file(name), {**who, **settings}, inputs, self.others, beside)

    def fits(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the model's context has room for this prompt and at least one token more."""
        return len(prompt_token_ids) < self.context_len


def sample(
    stream: Stream, requests: Iterable[Request], journal: Journal, row: Callable[[Completion], Row], bar: Progress
) -> None:
    """Journal, under its request's id, the row of each completion that is not there yet, as they finish.

    A text depends on the request and the run's seed alone, so the order in which they finish does not matter.
    """

    def todo() -> Iterator[Request]:
        for request in requests:
            if request.id in journal.done:
                bar.update()
            else:
                yield request

    with closing(stream(todo())) as completions:  # type: ignore[type-var]
        for completion in completions:
            journal.append(completion.id, [row(completion)])
            bar.update()


def seal_at_once(journal: Journal, rows: list[Row]) -> None:
    """Write a result that is computed in a moment: all of its rows in one line, and the seal."""
    if not journal.done:
        journal.append("all", rows)
    journal.seal(["all"])


def read_sealed(path: Path) -> list[Row]:
    """The rows of a file that a stage wrote; there may be none."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def kept(rows: Iterable[Row]) -> list[Row]:
    """The rows that a stage let through."""
    return [row for row in rows if row["verdict"] == KEPT]


def verdict(reason: str | None) -> Row:
    """A stage's judgement of a row: dropped for a reason, or kept."""
    return {"verdict": KEPT if reason is None else DROPPED, "reason": reason}
