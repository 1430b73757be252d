"""Recipes: a table or figure of the paper as a grid of runs, with the figures that were published.

A file of configs/recipes says what all runs have in common (`base`), and either names each (`cells`) or lists the
values of some settings (`grid`), which make a cell for each combination. What a cell says wins over the command line.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from isheep.artifacts import canonical_json
from isheep.config import (
    ASSESS_LEVELS,
    AnswerConfig,
    InstructConfig,
    RunConfig,
    UserError,
    as_overrides,
    data_path,
    did_you_mean,
    load_config,
    settings,
)
from isheep.summary import table
from isheep.text.prompts import questions
from isheep.text.topics import NUM_TOPICS, TYPES

# What --scale multiplies, with the least that each may be.
SCALED = {
    "instruct.data_size": 1,
    "instruct.max_prompts": 1,
    "select.num_clusters": 1,
    "train.max_samples": 2,  # one to train on, one to validate
    "train.warmup_steps": 0,
    "train.eval_steps": 1,
    "alarm.min_survivors": 0,
}
# Of an estimate: about what the paper's models and prompts come to. A text that all prompts of a stage begin with is
# computed once, and left out.
INSTRUCTION_TOKENS, ANSWER_TOKENS = 50, 160
# method -> tokens of a prompt, tokens that are written after it where there is room, instructions kept of them
WRITING: dict[str, tuple[int, float, int]] = {
    "list": (1000, math.inf, 6),
    "self_instruct": (250, 250, 4),
    "topics": (250, INSTRUCTION_TOKENS, 1),
}
NUM_TOPICS_IN_ALL, TYPE_TOKENS, TOPICS_TOKENS = len(TYPES) * NUM_TOPICS, 50, 80
# method -> tokens that are written for an instruction: thoughts, an input, the answer
ANSWERING = {"zero_shot": ANSWER_TOKENS, "instances": 50 + ANSWER_TOKENS, "principles": 60 + ANSWER_TOKENS}
YES_OR_NO_TOKENS, LONG_ANSWER_TOKENS = 2, 400
QUESTION_TOKENS, REPLY_TOKENS = 150, 100
PAIR_TOKENS = INSTRUCTION_TOKENS + ANSWER_TOKENS


@dataclass(frozen=True)
class Published:
    """Figures of the paper: lines of cells between "|". A figure with a "?" is one of which `notes` say a doubt.

    The columns "cell" and "iter" come first where they are to stand beside those of the grid. `model` is theirs.
    """

    title: str
    table: str
    model: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[list[str]]:
        """The head first."""
        return [[cell.strip() for cell in line.split("|")] for line in self.table.strip().splitlines()]

    @property
    def is_by_cell(self) -> bool:
        return self.lines[0][:2] == ["cell", "iter"]


@dataclass(frozen=True)
class Recipe:
    name: str
    title: str
    source: str  # where the paper has it
    base: dict = field(default_factory=dict)
    cells: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    published: tuple[dict, ...] = ()

    def overrides(self) -> dict[str, list[str]]:
        """Each cell's name -> its settings as "key=value" texts."""
        if bool(self.cells) == bool(self.grid):
            raise UserError(f"the recipe {self.name} needs [cells] or [grid], one of the two.")
        if self.cells:
            return {name: as_overrides(layer) for name, layer in self.cells.items()}
        axes = [[(key, value) for value in values] for key, values in _leaves(self.grid)]
        combinations = itertools.product(*axes)
        return {",".join(f"{key.rpartition('.')[2]}={value}" for key, value in each): as_overrides(dict(each))
                for each in combinations}  # fmt: skip

    def figures(self, model: str) -> list[Published]:
        """The tables of this model or, where the paper has none, of any."""
        every = [load_config(Published, each) for each in self.published]
        return [each for each in every if each.model in (None, model)] or every


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in layer.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value:
            yield prefix + name, value
        else:
            raise UserError(f"[grid] {prefix}{name} = {value!r} is no list of values: write some as [1, 2, 3].")


def load_recipe(name: str) -> Recipe:
    """A recipe of configs/recipes by its name, or any by its path."""
    files = {path.stem: path for path in sorted(data_path("configs", "recipes").glob("*.toml"))}
    file = Path(name) if name.endswith(".toml") else files.get(name)
    if file is None:
        raise UserError(f'there is no recipe "{name}".{did_you_mean(name, files)}')
    recipe = load_config(Recipe, {"name": file.stem}, file)
    for each in recipe.published:
        load_config(Published, each)
    return recipe


def scaled(cfg: RunConfig, scale: float) -> RunConfig:
    """`cfg` with the numbers of `SCALED` multiplied."""
    if not 0 < scale <= 1:
        raise UserError(f"--scale must be above 0 and at most 1, not {scale:g}.")
    layer = {
        key: max(least, round(value * scale)) for key, least in SCALED.items() if (value := get(cfg, key)) is not None
    }
    return load_config(RunConfig, settings(cfg), overrides=as_overrides(layer))


def get(cfg: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


@dataclass(frozen=True)
class Job:
    """One stage of one iteration: what it follows from, as a digest, and how many rows of about so many tokens.

    Jobs of one `key` share the rows they both have.
    """

    iteration: int
    stage: str
    key: str
    num_rows: int
    row_tokens: float


def jobs(cfg: RunConfig) -> Iterator[Job]:
    """The stages that take time. What they do depends on what earlier ones find: the most that it can be."""
    who = {name: value for name, value in settings(cfg).items() if not isinstance(value, dict)}
    for name in ("out", "baseline", "setting", "iterations", "patience", "device"):
        del who[name]
    size, train = cfg.instruct.data_size, cfg.train
    if cfg.instruct.method == "topics":
        size = min(size, NUM_TOPICS_IN_ALL)
    asked = settings(replace(cfg.assess, level="both"))
    asks = questions(cfg.assess.prompt, ASSESS_LEVELS[cfg.assess.level]) if cfg.scores else []
    model, pools, chosen = _key(who), list[str](), list[str]()
    for t in range(1, (cfg.iterations or 1) + 1):
        again = cfg.answer.verbose and t > 1  # instructions that are there, another way to answer
        written = _key(model, pools, again, settings(replace(cfg.instruct, data_size=1)))
        if not again:
            yield from _instruct_jobs(cfg.instruct, t, written, size)
        answered = _key(written, cfg.measure.catches, settings(replace(cfg.answer, verbose=False)))
        yield from _answer_jobs(cfg.answer, t, answered, size, again)
        pairs = _key(answered, size)
        for question in asks:
            reply = 0 if cfg.assess.score_decoding == "expected" else min(cfg.assess.max_tokens, REPLY_TOKENS)
            tokens = QUESTION_TOKENS + PAIR_TOKENS + reply
            yield Job(t, "assess", _key(answered, asked, question), size, tokens)
        if cfg.measure.enabled and not cfg.measure.catches:
            yield Job(t, "measure", _key(pairs, cfg.measure.batch_tokens), size, PAIR_TOKENS + ANSWER_TOKENS)
        chosen.append(_key(pairs, settings(cfg.select), cfg.scores, asked if asks else None))
        below = model if cfg.setting == "one_last" and t > 1 else None
        on = chosen if cfg.setting == "total_base" else chosen[-1:]
        rows = min(train.max_samples, size * len(on))
        model = _key(t, below, on, settings(replace(train, checkpoint_steps=1, gradient_checkpointing=True)))
        yield Job(t, "train", model, rows, train.epochs * PAIR_TOKENS)
        pools.append(_key(written, size))


def _instruct_jobs(cfg: InstructConfig, t: int, key: str, size: int) -> Iterator[Job]:
    if cfg.method == "topics":
        yield Job(t, "instruct", _key(key, "topics"), len(TYPES), TYPE_TOKENS + min(cfg.max_tokens, TOPICS_TOKENS))
    prompt, after, kept = WRITING[cfg.method]
    yield Job(t, "instruct", key, size, (prompt + min(cfg.max_tokens, after)) / kept)


def _answer_jobs(cfg: AnswerConfig, t: int, key: str, size: int, again: bool) -> Iterator[Job]:
    if again:
        yield Job(t, "answer", key, size, INSTRUCTION_TOKENS + LONG_ANSWER_TOKENS)
        return
    if cfg.method == "instances":
        yield Job(t, "answer", _key(key, "classes"), size, INSTRUCTION_TOKENS + YES_OR_NO_TOKENS)
    yield Job(t, "answer", key, size, INSTRUCTION_TOKENS + min(cfg.max_tokens, ANSWERING[cfg.method]))


def _key(*parts: Any) -> str:
    return sha256(canonical_json(parts).encode()).hexdigest()


def grid_lines(recipe: Recipe, cells: Mapping[str, RunConfig], scale: float | None) -> list[str]:
    """The grid before it starts: its cells, what `scale` has made of them, what they share and cost."""
    lines = [f"{recipe.title} ({recipe.source}), with {next(iter(cells.values())).model}"]
    lines += [f"  {name}: {', '.join(texts)}" for name, texts in recipe.overrides().items()]
    alike: dict[str, list[str]] = {}  # sizes -> the cells that have them
    for name, cfg in cells.items() if scale is not None else ():
        sizes = ", ".join(f"{key} {get(cfg, key):,}" for key in SCALED if get(cfg, key) is not None)
        alike.setdefault(sizes, []).append(name)
    lines += [f"scaled by {scale:g}, {', '.join(names)}: {sizes}" for sizes, names in alike.items()]
    return [*lines, *plan_lines(cells)]


def plan_lines(cells: Mapping[str, RunConfig]) -> list[str]:
    """A row for each iteration of each cell: the tokens of its stages, or the cell it shares them with."""
    seen: dict[str, tuple[int, str]] = {}  # key -> most rows so far, and whose they are
    stages = ("instruct", "answer", "assess", "measure", "train")
    lines, total, alone = [["cell", "iter", *stages]], 0.0, 0.0
    for name, cfg in cells.items():
        shown: dict[tuple[int, str], tuple[float, list[str]]] = {}
        for job in jobs(cfg):
            before, whose = seen.get(job.key, (0, name))
            new = max(0, job.num_rows - before) * job.row_tokens
            if job.num_rows > before:
                seen[job.key] = (job.num_rows, name)
            tokens, others = shown.get((job.iteration, job.stage), (0.0, []))
            shown[job.iteration, job.stage] = (tokens + new, others + [whose] * (before > 0))
            total, alone = total + new, alone + job.num_rows * job.row_tokens
        for t in range(1, (cfg.iterations or 1) + 1):
            lines.append([name, str(t), *(_share(*shown.get((t, stage), (0.0, []))) for stage in stages)])
    return [
        *table(lines).splitlines(),
        f"about {_tokens(total)} tokens at most, read and written; {_tokens(alone)} if no cell shared with another",
        "iterations after the first share more where adapters turn out the same",
    ]


def _share(tokens: float, others: list[str]) -> str:
    taken = f"as {'; '.join(dict.fromkeys(others))}" if others else ""
    if tokens and taken:
        return f"{_tokens(tokens)}, rest {taken}"
    return _tokens(tokens) if tokens else taken or "–"


def _tokens(n: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"
