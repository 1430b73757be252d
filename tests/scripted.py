"""A sampler that plays a script: each request's text follows from its id, so the loop's content needs no real model."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from isheep.artifacts import Journal
from isheep.sampler.request import Completion, Request
from isheep.stages import Iteration, seal_at_once
from isheep.text.templates import template
from isheep.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import write_tiny_tokenizer

WORDS = (
    "amber basin cedar delta ember fable grove harbor island juniper kettle lantern meadow nectar orchard pebble "
    "quarry river saddle timber umbrella valley willow yonder zephyr anchor breeze copper dragon engine falcon garden"
).split()


def words(key: str, n: int) -> str:
    """`n` words that follow from `key`."""
    draw = random.Random(key)
    return " ".join(draw.choice(WORDS) for _ in range(n))


def items(key: str, n: int = 4, first: int = 6) -> str:
    """A completion of `n` whole items and a cut one; every third instruction is too short."""
    parts = []
    for j in range(n):
        length = 2 if random.Random(f"{key} {j} short").random() < 0.3 else 9
        field = "<noinput>" if j % 2 else words(f"{key} {j} input", 6)
        task, n = f"Describe {words(f'{key} {j}', length)}.", first + j
        parts.append(f" {task}\n{n}. Input:\n{field}\n###\n{n + 1}. Instruction:")
    return "".join(parts) + " Describe the"


def script(request: Request) -> str:
    """Items for an instruction prompt; for an assessment mostly a good score; words for everything else."""
    kind = request.id.split("/")[-1]
    if "/instruct/" in request.id:
        return items(request.id)
    if kind in ("quality", "following", "overall"):
        return random.Random(request.id).choice(["9||Clear and correct.", " 10||Good", "6||Meh.", "none of these"])
    return words(request.id, 12) + "."


class ScriptedSampler:
    """`stream` finishes requests in a shuffled order, `batch` of them in flight; `seen` are the requests it took."""

    def __init__(self, play: Callable[[Request], str] = script, batch: int = 4, shuffle: int = 0) -> None:
        self.play, self.batch, self.draw = play, batch, random.Random(shuffle)
        self.seen: list[Request] = []

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        source = iter(requests)
        running: list[Request] = []
        while True:
            taken = list(islice(source, self.batch - len(running)))
            self.seen += taken
            running += taken
            if not running:
                return
            request = running.pop(self.draw.randrange(len(running)))
            text = self.play(request)
            yield Completion(
                request.id, 0, text, list(range(len(text.split()))), "stop", len(request.prompt_token_ids), 0
            )


class Stopped(BaseException):
    """A kill, as far as files are concerned: nothing may run on it."""


def stopping(sampler: ScriptedSampler, after: int) -> Callable[[Iterable[Request]], Iterator[Completion]]:
    """The sampler's `stream`, stopped once all of its calls together have given `after` completions."""
    left = after

    def stream(requests: Iterable[Request]) -> Iterator[Completion]:
        nonlocal left
        for completion in sampler.stream(requests):
            if left == 0:
                raise Stopped
            left -= 1
            yield completion

    return stream


def tiny_tokenizer(folder: Path) -> Tokenizer:
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def iteration(folder: Path, number: int = 1, **changes: object) -> Iteration:
    """An iteration of a run in `folder`, of the base model."""
    values: dict = {"seed": 0, "model": "tiny", "dtype": "float32", "context_len": 8192, "template": template("raw")}
    return Iteration(number=number, folder=folder / f"iter{number}", **{**values, **changes})


def seed_rows(n: int = 8) -> list[dict]:
    return [
        {
            "id": f"seed_{i}",
            "instruction": f"Tell me about {words(f'seed {i}', 6)}",
            "instances": [{"input": "", "output": "Yes."}],
            "is_classification": False,
        }
        for i in range(n)
    ]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below, but the seals' and events' neighbours that hold times."""
    timed = ("events.jsonl", "summary.md", "train_summary.json", "env.json")
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in timed
    }


def sealed(path: Path, rows: list[dict]) -> None:
    """Write a file as a stage leaves it."""
    with Journal(path, {}) as journal:
        seal_at_once(journal, rows)
