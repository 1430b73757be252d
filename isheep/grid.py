"""Running a grid: its cells one after the other on one loaded model, and what came of them beside the paper's figures.

Each cell is a run in a folder of its own, with the same files as if it had run alone. A stage that another cell has
done is taken from there; of one that shares some requests, only the others are sampled. A cell that fails is noted, and
the grid goes on.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from isheep.alarms import health, read_data
from isheep.artifacts import write_atomic
from isheep.config import RunConfig, UserError
from isheep.log import log
from isheep.recipes import Published, Recipe
from isheep.session import Session
from isheep.stages import kept, read_sealed
from isheep.summary import iterations, table

FINISHED, FAILED = "finished", "failed"
Outcomes = dict[str, dict[str, Any]]


def run_cells(
    cells: Mapping[str, RunConfig], open_session: Callable[[RunConfig], Session], run: Callable[[Session], None],
    results: Path,
) -> Outcomes:  # fmt: skip
    """Run every cell -> name -> {status, reason, iterations}, which `results` holds after each."""
    outcomes: Outcomes = {}
    for n, (name, cfg) in enumerate(cells.items(), 1):
        log.info("cell %d of %d: %s", n, len(cells), name)
        session, reason = open_session(cfg), None
        try:
            run(session)
        except UserError as error:
            reason = str(error)
            session.events.write("run failed", reason=reason)
            log.warning("cell %s failed, the grid goes on: %s", name, reason)
        session.close()
        found = [numbers(folder) for folder in iterations(session.out) if (folder / "train_summary.json").exists()]
        outcomes[name] = {"status": FAILED if reason else FINISHED, "reason": reason, "iterations": found}
        write_atomic(results, json.dumps(outcomes, ensure_ascii=False, indent=1) + "\n")
    return outcomes


def numbers(folder: Path) -> dict[str, Any]:
    """A finished iteration, in the columns of the grid's table; `unread`: ratings that are no score."""
    data, trained = health(read_data(folder)), json.loads((folder / "train_summary.json").read_bytes())
    replies = folder / "replies.jsonl"
    unread = len([row for row in read_sealed(replies) if row["score"] is None]) if replies.exists() else None
    return {
        "iter": int(folder.name.removeprefix("iter")),
        "pairs": len(kept(read_sealed(folder / "answers.jsonl"))),
        "unread": unread,
        "survivors": data.survivors,
        "median_words": data.median_words,
        "final_loss": trained["final_loss"],
        "best_val_loss": trained["best_val_loss"],
    }


OURS = ("pairs", "unread", "survivors", "median_words", "final_loss", "best_val_loss")


def report(recipe: Recipe, model: str, outcomes: Outcomes) -> str:
    """The grid's numbers with the published ones beside, the failures' reasons, and the paper's other tables."""
    figures = recipe.figures(model)
    beside = next((each for each in figures if each.is_by_cell), None)
    parts = [f"# {recipe.title}\n\nPublished figures: {recipe.source}\n\n", table(_lines(outcomes, beside))]
    parts += [f"\n{name} failed: {each['reason']}\n" for name, each in outcomes.items() if each["reason"]]
    for each in figures:
        head = f"\n{'Beside ours' if each is beside else 'Published'}: {each.title}\n"
        parts += [head, *(f"- {note}\n" for note in each.notes)]
        parts += [] if each is beside else ["\n", table(each.lines)]
    return "".join(parts)


def _lines(outcomes: Outcomes, beside: Published | None) -> list[list[str]]:
    """A line for each iteration of each cell, ours or the paper's; a failed cell says so where its numbers end."""
    (_, _, *columns), *rows = beside.lines if beside else [["cell", "iter"]]
    published = {(cell, number): values for cell, number, *values in rows}
    ours: dict[tuple[str, str], list[str]] = {}
    for name, outcome in outcomes.items():
        for found in outcome["iterations"]:
            ours[name, str(found["iter"])] = [_number(found[key]) for key in OURS]
        if outcome["status"] == FAILED:
            ours[name, str(len(outcome["iterations"]) + 1)] = [FAILED, *[""] * (len(OURS) - 1)]
    keys = sorted(ours.keys() | published.keys(), key=lambda key: (_place(key[0], outcomes), key[1]))
    blank = [""] * len(OURS), [""] * len(columns)
    lines = [[*key, *ours.get(key, blank[0]), *published.get(key, blank[1])] for key in keys]
    return [["cell", "iter", *OURS, *columns], *lines]


def _place(cell: str, outcomes: Outcomes) -> int:
    """In the order of the recipe; what only the paper has comes first."""
    return list(outcomes).index(cell) if cell in outcomes else -1


def _number(value: float | None) -> str:
    """Counts and medians as they are, losses with four decimals."""
    return "" if value is None else f"{value:.4f}" if value % 0.5 else f"{value:g}"
