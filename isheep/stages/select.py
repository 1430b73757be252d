"""Which pairs are trained on, and the ledger: what became of every instruction, and why (paper §4 and §5)."""

import json
from collections import Counter
from collections.abc import Mapping

from isheep.artifacts import write_atomic
from isheep.config import SelectConfig, UserError, settings
from isheep.filter.select import select as select_rows
from isheep.stages import KEPT, Iteration, Row, kept, read_sealed, seal_at_once

TRAINED_ON = ("instruction", "input", "output", "quality_score", "following_score")


def select(it: Iteration, cfg: SelectConfig) -> None:
    """Keep the pairs whose scores or perplexities pass.

    reads   instructions.jsonl, answers.jsonl, scores.jsonl and measures.jsonl where they were made
    writes  selected.jsonl   every instruction with all that was found out about it: output, scores, perplexities;
                             verdict, reason and `stage`, the stage that dropped or kept it
            dataset.json     the kept ones in Alpaca's format, with their scores
    Raises UserError, with the ledger counted, where none is kept.
    """
    names = ("instructions.jsonl", "answers.jsonl", "scores.jsonl", "measures.jsonl")
    files = {name.partition(".")[0]: it.file(name) for name in names if it.file(name).exists()}
    with it.journal("selected.jsonl", settings(cfg), files) as journal:
        if not journal.sealed:
            seal_at_once(journal, _ledger({name: read_sealed(path) for name, path in files.items()}, cfg))
        ledger = journal.rows()
    survivors = [{name: row.get(name) for name in TRAINED_ON} for row in kept(ledger)]
    if not survivors:
        raise UserError(_nothing_left(it, ledger, cfg))
    write_atomic(it.file("dataset.json"), json.dumps(survivors, ensure_ascii=False, indent=1) + "\n")


def _ledger(found: Mapping[str, list[Row]], cfg: SelectConfig) -> list[Row]:
    """One row per instruction, in order, judged by the last stage that it reached."""
    later = {name: {row["id"]: row for row in rows} for name, rows in found.items()}
    ledger = []
    for instruction in found["instructions"]:
        row = {**instruction, "stage": "instruct"}
        del row["most_similar"]  # ten ids and numbers: instructions.jsonl has them
        if row["verdict"] == KEPT:
            row |= {**later["answers"][row["id"]], "stage": "answer"}
        if row["verdict"] == KEPT:
            for name in ("scores", "measures"):
                row |= later.get(name, {}).get(row["id"], {})
            row["stage"] = "select"
        ledger.append(row)
    return select_rows(ledger, cfg)


def _nothing_left(it: Iteration, ledger: list[Row], cfg: SelectConfig) -> str:
    """What became of all rows, and what to change."""
    counts = Counter(f"{row['stage']} {row['reason']}" for row in ledger)
    dropped = ", ".join(f"{n} by {reason}" for reason, n in counts.most_common()) or "no completion had one"
    scores = [row["quality_score"] for row in ledger if row.get("quality_score") is not None]
    if cfg.method == "threshold":
        best = f" (the best quality score is {max(scores)})" if scores else ""
        change = f"lower select.threshold = {cfg.threshold:g}{best}"
    else:
        change = f"raise select.max_ppl = {cfg.max_ppl:g}"
    return (
        f"{it.name}: none of {len(ledger)} instructions is left to train on ({dropped}): {change}, or raise "
        f"instruct.data_size, with another --out; everything made so far stays in {it.folder}."
    )
