"""Seed tasks: the few hand-written tasks that the loop grows from, in the field's public JSONL schema.

One task a line: `id`, `instruction`, `instances` (its first `{input, output}` is used), `is_classification`; other
fields, such as `name`, are not read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isheep.artifacts import read_rows
from isheep.config import UserError


@dataclass(frozen=True)
class SeedTask:
    """One seed. `input` is "" for a task without an input."""

    id: str
    instruction: str
    input: str
    output: str
    is_classification: bool


def load_seeds(path: Path | str) -> tuple[list[SeedTask], int]:
    """The seed tasks in `path` and how many malformed rows were skipped; UserError if no row is a seed task."""
    rows, skipped = read_rows(Path(path))
    tasks = [task for task in map(_seed_task, rows) if task is not None]
    if not tasks:
        raise UserError(
            f"none of the {len(rows)} rows in {path} is a seed task: each needs id, instruction, "
            "instances [{input, output}] and is_classification."
        )
    return tasks, skipped + len(rows) - len(tasks)


def _seed_task(row: dict[str, Any]) -> SeedTask | None:
    """`row` as a task; None where it breaks the schema."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else None
    if not isinstance(first, dict):
        return None
    texts = [row.get("id"), row.get("instruction"), first.get("input"), first.get("output")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.get("is_classification"), bool):
        return None
    if not row["id"].strip() or not row["instruction"].strip():
        return None
    return SeedTask(row["id"], row["instruction"], first["input"], first["output"], row["is_classification"])
