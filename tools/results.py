"""What grids of runs came to, for RESULTS.md: command, commit, machine, seconds, and a row for each iteration.

    python tools/results.py runs/prompts runs/iterative > tables.md

Counts are those of each iteration's own files, as summary.md has them. The seconds are of the stages that a cell did
itself; a stage that another cell had done takes none.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from isheep.artifacts import read_rows
from isheep.summary import iterations, stage_counts, table

COLUMNS = {
    "items": ("instruct", "items"),
    "instructions": ("instruct", "kept"),
    "pairs": ("answer", "kept"),
    "words": ("answer", "output words, mean/median"),
    "survivors": ("select", "kept"),
    "their words": ("select", "output words, mean/median"),
    "with input, %": ("select", "with an input, %"),
    "repeated": ("select", "repeated instructions"),
    "first loss": ("train", "first loss"),
    "last": ("train", "final loss"),
    "validation": ("train", "best validation loss"),
}


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        print(section(folder))


def section(grid: Path) -> str:
    """A grid's heading, how it was run, and its table."""
    cells = {name: grid / name for name in json.loads((grid / "results.json").read_bytes())}
    env = json.loads((next(iter(cells.values())) / "env.json").read_bytes())
    seconds = sum(spent(folder) for folder in cells.values())
    threads = f"{env['num_threads']} thread{'s' * (env['num_threads'] > 1)}"
    how = [
        f"    python -m isheep.run {shlex.join(env['command'][1:])}",
        f"Commit {(env['commit'] or 'unknown')[:7]}, {env['device_name']}, {threads}, torch "
        f"{env['versions']['torch']}; {seconds / 60:.0f} min in all.",
    ]
    lines = [["cell", "iter", *COLUMNS, "unread", "s"]]
    for name, folder in cells.items():
        lines += [row(name, each) for each in iterations(folder)]
    return f"## {grid.name}\n\n" + "\n\n".join(how) + f"\n\n{table(lines)}\n{failures(grid)}"


def row(cell: str, folder: Path) -> list[str]:
    """One iteration. `unread` is how many ratings of each question were no score, of those asked."""
    stages = ["instruct", "answer", "assess", "select", "train"]
    if not (folder / "dataset.json").exists():  # none was left: the cell failed
        stages.remove("select")
    found = {stage: stage_counts(folder, stage) if stage in stages else {} for stage in (*stages, "select")}
    values = [found[stage].get(key) for stage, key in COLUMNS.values()]
    asked = {key.removeprefix("asked for "): n for key, n in found["assess"].items() if key.startswith("asked for ")}
    unread = ", ".join(f"{found['assess'][f'no {question} score read']} of {n}" for question, n in asked.items())
    number = folder.name.removeprefix("iter")
    return [cell, number, *map(shown, values), unread, f"{spent(folder.parent, int(number)):.0f}"]


def spent(run: Path, iteration: int | None = None) -> float:
    """Seconds in the stages of a run, of one iteration or of all."""
    events = read_rows(run / "events.jsonl")[0]
    done = [each for each in events if each["event"] in ("stage finished", "stage stopped")]
    return sum(each["seconds"] for each in done if iteration in (None, each["iteration"]))


def failures(grid: Path) -> str:
    outcomes = json.loads((grid / "results.json").read_bytes())
    return "".join(f"{name} failed: {each['reason']}\n\n" for name, each in outcomes.items() if each["reason"])


def shown(value: Any) -> str:
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
