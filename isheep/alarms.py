"""What goes wrong unnoticed while a loop feeds on itself: short answers, copies, full marks, few rows, a rising loss.

In the data that the paper released the median answer shrinks from 57 words to 13 over the iterations, and from the
fourth on some 200 instructions repeat others. Here each is measured on the rows an iteration trains on; the limits are
in the configuration's [alarm].
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from isheep.config import AlarmConfig, UserError
from isheep.log import Events, log
from isheep.stages import Iteration, Row, read_sealed

FULL_MARKS = 10


@dataclass(frozen=True)
class Health:
    """The rows that one iteration trains on. Words are those between blanks."""

    survivors: int
    with_input: float  # share
    median_words: float  # of the outputs
    distinct_2: float  # different pairs of neighbouring words, as a share of all, over all outputs
    duplicates: int  # instructions that an earlier iteration trained on, or another row here has
    full_marks: float | None  # share of 10s among the quality scores; None where nothing was rated

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def health(rows: Sequence[Row], earlier: Iterable[Sequence[Row]] = ()) -> Health:
    """Of an iteration's data set; `earlier` are the data sets of the iterations before it."""
    words = [row["output"].split() for row in rows]
    pairs = [pair for each in words for pair in pairwise(each)]
    seen = {_same(row) for data in earlier for row in data}
    instructions = [_same(row) for row in rows]
    repeated = sum(text in seen or text in instructions[:i] for i, text in enumerate(instructions))
    scores = [row["quality_score"] for row in rows if row.get("quality_score") is not None]
    return Health(
        survivors=len(rows),
        with_input=sum(bool(row["input"]) for row in rows) / len(rows),
        median_words=statistics.median(map(len, words)),
        distinct_2=len(set(pairs)) / len(pairs) if pairs else 0.0,
        duplicates=repeated,
        full_marks=sum(round(score) == FULL_MARKS for score in scores) / len(scores) if scores else None,
    )


def _same(row: Row) -> str:
    """Two instructions are one where this is: case and blanks do not count."""
    return " ".join(f"{row['instruction']} {row['input']}".lower().split())


def data_alarms(now: Health, first: Health, cfg: AlarmConfig) -> list[str]:
    """What is wrong with an iteration's data, compared with the first iteration's: a sentence each."""
    found = []
    if now.survivors < cfg.min_survivors:
        found.append(f"only {now.survivors} rows are left to train on (alarm.min_survivors = {cfg.min_survivors})")
    if now.median_words < cfg.min_length_ratio * first.median_words:
        found.append(
            f"outputs have shrunk to a median of {now.median_words:g} words from {first.median_words:g} in iteration 1 "
            f"(alarm.min_length_ratio = {cfg.min_length_ratio:g})"
        )
    if now.duplicates > cfg.max_duplicates * now.survivors:
        found.append(
            f"{now.duplicates} of {now.survivors} instructions repeat others (alarm.max_duplicates = "
            f"{cfg.max_duplicates:g} of all)"
        )
    if now.full_marks is not None and now.full_marks > cfg.max_full_marks:
        found.append(
            f"{now.full_marks:.0%} of the quality scores are {FULL_MARKS}: they tell nothing apart any more "
            f"(alarm.max_full_marks = {cfg.max_full_marks:g})"
        )
    return found


def loss_alarms(log: Sequence[Row], cfg: AlarmConfig) -> list[str]:
    """Whether a training went up instead of down: its validation losses or, without any, those of its steps."""
    losses = [row["val_loss"] for row in log if "val_loss" in row] or [row["loss"] for row in log]
    if losses[-1] <= cfg.max_loss_ratio * min(losses):
        return []
    return [f"the loss ended at {losses[-1]:.4f}, from {min(losses):.4f} at its best (alarm.max_loss_ratio = "
            f"{cfg.max_loss_ratio:g})"]  # fmt: skip


class Alarms:
    """Looks at each iteration of a run in `out`; what rings goes to the log and to events.jsonl, or ends the run."""

    def __init__(self, out: Path, cfg: AlarmConfig, events: Events) -> None:
        self.out, self.cfg, self.events = out, cfg, events

    def look_at_data(self, it: Iteration) -> None:
        """Before training. Raises UserError for an alarm under on_alarm = "stop"."""
        data = [read_data(self.out / f"iter{t}") for t in range(1, it.number + 1)]
        now = health(data[-1], data[:-1])
        self.events.write("health", iteration=it.number, **now.to_json())
        self._ring(it, data_alarms(now, health(data[0]), self.cfg))

    def look_at_training(self, it: Iteration) -> None:
        """After training. Raises UserError for an alarm under on_alarm = "stop"."""
        self._ring(it, loss_alarms(read_sealed(it.file("train_log.jsonl")), self.cfg))

    def _ring(self, it: Iteration, alarms: list[str]) -> None:
        for alarm in alarms:
            self.events.write("alarm", iteration=it.number, alarm=alarm)
            if self.cfg.on_alarm == "stop":
                raise UserError(f'{it.name}: {alarm}; alarm.on_alarm = "warn" goes on all the same.')
            log.warning("%s: %s", it.name, alarm)


def is_out_of_patience(out: Path, number: int, patience: int | None) -> bool:
    """Whether the best validation loss of the last `patience` iterations is no better than that of those before."""
    if patience is None or number <= patience:
        return False
    files = [out / f"iter{t}" / "train_summary.json" for t in range(1, number + 1)]
    losses = [json.loads(file.read_bytes())["best_val_loss"] for file in files]
    if min(losses[-patience:]) < min(losses[:-patience]):
        return False
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    log.info("no better validation loss for %d iterations (%s): the run ends here", patience, shown)
    return True


def read_data(folder: Path) -> list[Row]:
    """The rows that an iteration trains on."""
    return json.loads((folder / "dataset.json").read_bytes())
