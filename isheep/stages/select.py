"""Which pairs are trained on, and the ledger: what became of every instruction, and why (paper §4 and §5)."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from isheep.artifacts import write_atomic
from isheep.config import SelectConfig, UserError, settings
from isheep.filter.select import select as select_rows
from isheep.stages import KEPT, Iteration, Row, kept, read_sealed, seal_at_once, verdict

TRAINED_ON = ("instruction", "input", "output", "quality_score", "following_score")


def select(it: Iteration, cfg: SelectConfig, scores: Sequence[str]) -> None:
    """Keep the pairs whose scores or perplexities pass; `scores` are those that were asked for (`RunConfig.scores`).

    reads   instructions.jsonl, answers.jsonl, scores.jsonl and measures.jsonl where they were made
    writes  selected.jsonl   every instruction with all that was found out about it: output, scores, perplexities;
                             verdict, reason and `stage`, the stage that dropped or kept it; where pairs are kept
                             against the rules (threshold -1) `pardoned`, the rule that had dropped it, or null
            dataset.json     the kept ones in Alpaca's format, with their scores
    Raises UserError, with the ledger counted, where none is kept.
    """
    names = ("instructions.jsonl", "answers.jsonl", "scores.jsonl", "measures.jsonl")
    files = {name.partition(".")[0]: it.file(name) for name in names if it.file(name).exists()}
    with it.journal("selected.jsonl", {**settings(cfg), "scores": list(scores)}, files) as journal:
        if not journal.sealed:
            seal_at_once(journal, _ledger({name: read_sealed(path) for name, path in files.items()}, cfg, scores))
        ledger = journal.rows()
    survivors = [{name: row.get(name) for name in TRAINED_ON} for row in kept(ledger)]
    if not survivors:
        raise UserError(_nothing_left(it, ledger, cfg, scores))
    write_atomic(it.file("dataset.json"), json.dumps(survivors, ensure_ascii=False, indent=1) + "\n")


def _ledger(found: Mapping[str, list[Row]], cfg: SelectConfig, scores: Sequence[str]) -> list[Row]:
    """One row per instruction, in order, judged by the last stage that it reached."""
    later = {name: {row["id"]: row for row in rows} for name, rows in found.items()}
    ledger = []
    for instruction in found["instructions"]:
        row = {**instruction, "stage": "instruct"}
        del row["most_similar"]  # ten ids and numbers: instructions.jsonl has them
        if row["verdict"] == KEPT:
            row |= {**later["answers"][row["id"]], "stage": "answer"}
            if cfg.pardons:
                row |= _pardon(row)
        if row["verdict"] == KEPT:
            for name in ("scores", "measures"):
                row |= later.get(name, {}).get(row["id"], {})
            row["stage"] = "select"
        ledger.append(row)
    return select_rows(ledger, cfg, scores)


def _pardon(pair: Row) -> Row:
    """The pair's verdict without the rules; one that never fitted the context has no answer and stays dropped."""
    return {**verdict(None), "pardoned": pair["reason"]} if pair["finish_reason"] is not None else {"pardoned": None}


def _nothing_left(it: Iteration, ledger: list[Row], cfg: SelectConfig, scores: Sequence[str]) -> str:
    """What became of all rows, and what to change."""
    counts = Counter(f"{row['stage']} {row['reason']}" for row in ledger)
    dropped = ", ".join(f"{n} by {reason}" for reason, n in counts.most_common()) or "no completion had one"
    if scores:
        known = [row[f"{scores[0]}_score"] for row in ledger if row.get(f"{scores[0]}_score") is not None]
        best = f" (the best {scores[0]} score is {max(known)})" if known else ""
        change = f"lower select.threshold = {cfg.threshold:g}{best}, or "
    else:
        change = f"raise select.max_ppl = {cfg.max_ppl:g}, or " if cfg.method == "ppl" else ""
    return (
        f"{it.name}: none of {len(ledger)} instructions is left to train on ({dropped}): {change}raise "
        f"instruct.data_size, with another --out; everything made so far stays in {it.folder}."
    )
