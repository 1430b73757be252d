"""Which pairs are trained on, and the ledger: what became of every instruction, and why (paper §4 and §5)."""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from safetensors import safe_open

from isheep.artifacts import write_atomic
from isheep.config import MeasureConfig, SelectConfig, UserError, settings
from isheep.filter.kmeans import kmeans
from isheep.filter.select import select as select_rows
from isheep.log import log
from isheep.stages import KEPT, Iteration, Row, kept, read_sealed, seal_at_once, verdict

TRAINED_ON = ("instruction", "input", "output", "quality_score", "following_score")


def select(
    it: Iteration,
    cfg: SelectConfig,
    scores: Sequence[str],
    pooling: str = MeasureConfig.pooling,
    device: torch.device | str = "cpu",
) -> None:
    """Keep the pairs whose scores or perplexities pass, or one of each cluster of their vectors.

    `scores` are those that were asked for (`RunConfig.scores`); vectors of this `pooling` are clustered on `device`.

    reads   instructions.jsonl, answers.jsonl, scores.jsonl and measures.jsonl where they were made; vectors.safetensors
            where the method clusters
    writes  selected.jsonl   every instruction with all that was found out about it: output, scores, perplexities,
                             cluster;
                             verdict, reason and `stage`, the stage that dropped or kept it; where pairs are kept
                             against the rules (threshold -1) `pardoned`, the rule that had dropped it, or null
            dataset.json     the kept ones in Alpaca's format, with their scores
    Raises UserError, with the ledger counted, where none is kept; and where there are fewer pairs than clusters.
    """
    names = ("instructions.jsonl", "answers.jsonl", "scores.jsonl", "measures.jsonl")
    files = {name.partition(".")[0]: it.file(name) for name in names if it.file(name).exists()}
    what, inputs = {**settings(cfg), "scores": list(scores), "pooling": pooling}, dict(files)
    if cfg.clusters:
        _check_num_clusters(it, cfg)  # before the journal is there, so that it may be mended
        inputs["vectors"] = it.file("vectors.safetensors")
    else:
        del what["num_clusters"], what["pooling"]
    with it.journal("selected.jsonl", what, inputs) as journal:
        if not journal.sealed:
            found = {name: read_sealed(path) for name, path in files.items()}
            if cfg.clusters:
                found["clusters"] = _clusters(it, [row["id"] for row in found["measures"]], cfg, pooling, device)
            seal_at_once(journal, _ledger(found, cfg, scores, _key(it)))
        ledger = journal.rows()
    survivors = [{name: row.get(name) for name in TRAINED_ON} for row in kept(ledger)]
    if not survivors:
        raise UserError(_nothing_left(it, ledger, cfg, scores))
    write_atomic(it.file("dataset.json"), json.dumps(survivors, ensure_ascii=False, indent=1) + "\n")


def _key(it: Iteration) -> str:
    """What all random draws of the selection follow from."""
    return f"{it.seed}/{it.name}/select"


def _check_num_clusters(it: Iteration, cfg: SelectConfig) -> None:
    """UserError where pairs are too few. Iteration 1 can go on with less: nothing there depends on the number yet."""
    n = len(read_sealed(it.file("measures.jsonl")))
    if 0 < n < cfg.num_clusters:
        change = f"at most {n} is possible, with another --out; everything made so far stays in {it.folder}"
        if it.number == 1:
            change = f"give at most {n}, write the same into {it.folder.parent / 'config.toml'}, and the run goes on"
        raise UserError(f"{it.name}: {n} pairs cannot fill select.num_clusters = {cfg.num_clusters}: {change}.")


def _clusters(it: Iteration, ids: list[str], cfg: SelectConfig, pooling: str, device: torch.device | str) -> list[Row]:
    """{id, cluster} of the pairs that were measured, which are `ids`."""
    if not ids:
        return []
    with safe_open(it.file("vectors.safetensors"), "pt") as file:
        vectors = file.get_tensor(pooling)
    seed = random.Random(f"{_key(it)}/kmeans").getrandbits(63)
    labels, inertia = kmeans(vectors, cfg.num_clusters, seed, device)
    found = f"{len(ids)} pairs in {len(labels.unique())} clusters of {pooling} vectors, inertia {inertia:.6g}"
    log.info("%s select: %s", it.name, found)
    return [{"id": row_id, "cluster": k} for row_id, k in zip(ids, labels.tolist(), strict=True)]


def _ledger(found: Mapping[str, list[Row]], cfg: SelectConfig, scores: Sequence[str], key: str) -> list[Row]:
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
            for name in ("scores", "measures", "clusters"):
                row |= later.get(name, {}).get(row["id"], {})
            row["stage"] = "select"
        ledger.append(row)
    return select_rows(ledger, cfg, scores, key)


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
