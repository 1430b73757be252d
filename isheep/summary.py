"""What a run did, in numbers: read from the files of its folder alone, printed, and written as summary.md.

One column per iteration: what was sampled, what each stage dropped and why, lengths, losses, seconds and speed. The
seconds are those that events.jsonl knows of: what a killed start did is not in them.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from isheep.alarms import health, read_data
from isheep.artifacts import read_rows, write_atomic
from isheep.config import ASSESS_LEVELS
from isheep.stages import DROPPED, Row, kept, read_sealed
from isheep.text.prompts import QUESTIONS, questions


def instruct_counts(folder: Path) -> dict[str, Any]:
    completions, rows = read_sealed(folder / "completions.jsonl"), read_sealed(folder / "instructions.jsonl")
    return {
        "prompts": len(completions),
        "completion tokens": sum(row["num_output_tokens"] for row in completions),
        "items": len(rows),
        "malformed items": sum(row["num_malformed"] for row in completions),
        **_judged(rows),
        **_lengths("instruction", rows),
        "with an input, %": _percent(len([row for row in kept(rows) if row["input"]]), len(kept(rows))),
    }


def answer_counts(folder: Path) -> dict[str, Any]:
    rows = read_sealed(folder / "answers.jsonl")
    return {
        "answer tokens": sum(row["num_output_tokens"] for row in rows),
        "cut at max_tokens": len([row for row in rows if row["finish_reason"] == "length"]),
        **_judged(rows),
        **_lengths("output", rows),
    }


def assess_counts(folder: Path) -> dict[str, Any]:
    replies, scores = read_sealed(folder / "replies.jsonl"), read_sealed(folder / "scores.jsonl")
    made = json.loads((folder / "scores.jsonl.seal").read_bytes())["settings"]
    counts: dict[str, Any] = {}
    for question in questions(made["prompt"], ASSESS_LEVELS[made["level"]]):
        asked = len([row for row in replies if row["question"] == question])
        column = f"{QUESTIONS[question].scores[0]}_score"
        read = [row[column] for row in scores if row[column] is not None]
        counts |= {f"asked for {question}": asked, f"no {question} score read": asked - len(read)}
        counts[f"{question} scores"] = " ".join(f"{s}:{n}" for s, n in sorted(Counter(map(round, read)).items()))
    return counts


def measure_counts(folder: Path) -> dict[str, Any]:
    rows = read_sealed(folder / "measures.jsonl")
    return {f"median {name}": _median(row[name] for row in rows) for name in ("output_ppl", "pair_ppl")}


def select_counts(folder: Path) -> dict[str, Any]:
    rows = [row for row in read_sealed(folder / "selected.jsonl") if row["stage"] == "select"]
    pardoned = len([row for row in rows if row.get("pardoned")])
    against = {"kept against the rules": pardoned} if pardoned else {}
    data = health(read_data(folder), [read_data(earlier) for earlier in _before(folder)])
    return {
        **_judged(rows),
        **against,
        **_lengths("output", rows),
        "with an input, %": round(100 * data.with_input),
        "distinct word pairs, %": round(100 * data.distinct_2),
        "repeated instructions": data.duplicates,
        "quality scores of 10, %": None if data.full_marks is None else round(100 * data.full_marks),
    }


def _before(folder: Path) -> list[Path]:
    """The folders of the iterations before this one."""
    return [folder.parent / f"iter{t}" for t in range(1, int(folder.name.removeprefix("iter")))]


def train_counts(folder: Path) -> dict[str, Any]:
    log = read_sealed(folder / "train_log.jsonl")
    done = json.loads((folder / "train_summary.json").read_bytes())
    return {
        "rows to train on": done["num_rows"],
        "rows to validate": done["num_val_rows"],
        "steps": done["num_steps"],
        "first loss": round(log[0]["loss"], 4),
        "final loss": round(done["final_loss"], 4),
        "best validation loss": done["best_val_loss"] and round(done["best_val_loss"], 4),
        "training tokens": done["num_tokens"],
        "training tokens/s": done["tok_per_s"],
        "peak GiB": done["peak_gib"],
    }


# stage -> the file that says it is finished, and its counts {words: number or text} from an iteration's folder
STAGES: Mapping[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "instruct": ("instructions.jsonl.seal", instruct_counts),
    "answer": ("answers.jsonl.seal", answer_counts),
    "assess": ("scores.jsonl.seal", assess_counts),
    "measure": ("measures.jsonl.seal", measure_counts),
    "select": ("selected.jsonl.seal", select_counts),
    "train": ("train_summary.json", train_counts),
    "show": ("samples.jsonl.seal", lambda _: {}),
}


def stage_counts(folder: Path, stage: str) -> dict[str, Any]:
    """The counts of a finished stage; none where it is not finished."""
    seal, counts = STAGES[stage]
    return counts(folder) if (folder / seal).exists() else {}


def write_summary(out: Path) -> str:
    """Make out/summary.md from what is in the folder -> its text."""
    folders = iterations(out)
    times = _times(out / "events.jsonl")
    columns = [_column(folder, times) for folder in folders]
    text = f"# {out.name}\n\n{_by_stage([f.name for f in folders], columns)}\n{_samples(folders)}"
    write_atomic(out / "summary.md", text)
    return text


def iterations(out: Path) -> list[Path]:
    """The folders of a run's iterations, in order."""
    folders = [f for f in out.glob("iter*") if f.name.removeprefix("iter").isdecimal()]
    return sorted(folders, key=lambda f: int(f.name.removeprefix("iter")))


def _column(folder: Path, times: Mapping[tuple[str, str], Counter[str]]) -> dict[str, Any]:
    """One iteration: 'stage: words' -> value."""
    column: dict[str, Any] = {}
    for stage in STAGES:
        spent = times.get((folder.name, stage), Counter())
        counts = stage_counts(folder, stage)
        if spent["num_decode_tokens"]:
            prompts = spent["num_prefill_tokens"] + spent["num_cached_tokens"]
            counts["prompt tokens from the cache, %"] = round(100 * spent["num_cached_tokens"] / max(prompts, 1))
            counts["output tokens/s"] = round(spent["num_decode_tokens"] / spent["seconds"])
        if spent:
            counts["seconds"] = round(spent["seconds"], 1)
        column |= {f"{stage}: {words}": value for words, value in counts.items()}
    return column


def _times(events: Path) -> dict[tuple[str, str], Counter[str]]:
    """(iteration's name, stage) -> seconds and tokens, over all starts of the run."""
    times: dict[tuple[str, str], Counter[str]] = {}
    for row in read_rows(events)[0]:  # a full disk may have torn a line
        if row["event"] in ("stage finished", "stage stopped"):
            spent = times.setdefault((f"iter{row['iteration']}", row["stage"]), Counter())
            names = ("seconds", "num_decode_tokens", "num_prefill_tokens", "num_cached_tokens")
            spent.update({name: row.get(name, 0) for name in names})
    return times


def _by_stage(names: list[str], columns: list[dict[str, Any]]) -> str:
    """A row for everything that any iteration has, in stage order."""
    words = [w for stage in STAGES for w in dict.fromkeys(w for c in columns for w in c) if w.startswith(f"{stage}: ")]
    return table([["", *names], *([w, *(_shown(column.get(w)) for column in columns)] for w in words)])


def table(lines: list[list[str]]) -> str:
    """Markdown that is also aligned for a terminal; the head is the first of `lines`."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in ruled]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _samples(folders: list[Path]) -> str:
    """The fixed tasks with each model's answer below."""
    rows = [row for f in folders if (f / "samples.jsonl.seal").exists() for row in read_sealed(f / "samples.jsonl")]
    tasks: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        answers = tasks.setdefault((row["instruction"], row["input"]), [])
        answers.append(f"- **{row['model']}**: {' '.join(row['output'].split())}\n")
    return "".join(f"\n**{' '.join(task).strip()}**\n\n{''.join(answers)}" for task, answers in tasks.items())


def _judged(rows: list[Row]) -> dict[str, int]:
    """How many were dropped for each reason, and how many kept."""
    reasons = Counter(row["reason"] for row in rows if row["verdict"] == DROPPED)
    return {f"- {reason}": n for reason, n in sorted(reasons.items())} | {"kept": len(kept(rows))}


def _lengths(field: str, rows: list[Row]) -> dict[str, str]:
    """Mean and median words of a field over the kept rows, as the paper's released data is described."""
    words = [len(row[field].split()) for row in kept(rows)] or [0]
    return {f"{field} words, mean/median": f"{statistics.mean(words):.0f}/{statistics.median(words):.0f}"}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None


def _percent(part: int, whole: int) -> int:
    return round(100 * part / whole) if whole else 0
