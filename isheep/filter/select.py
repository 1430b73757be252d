"""Which assessed pairs are trained on: a table with one row per method of the paper (its filter ablation)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isheep.config import SelectConfig

Row = Mapping[str, Any]


def select(rows: Sequence[Row], cfg: SelectConfig, scores: Sequence[str], key: str = "") -> list[dict[str, Any]]:
    """`rows` with "verdict" ("kept" or "dropped") and "reason" (None for kept), in the same order.

    A row that an earlier stage dropped keeps its verdict and its reason; it takes no part in the selection. `scores`
    are those that were asked for, of "quality" and "following"; what is drawn at random follows from `key`.
    """
    open_rows = [row for row in rows if row.get("verdict") != "dropped"]
    reasons = iter(METHODS[cfg.method](open_rows, cfg, scores, key))
    return [dict(row) if row.get("verdict") == "dropped" else {**row, **_verdict(next(reasons))} for row in rows]


def _verdict(reason: str | None) -> dict[str, str | None]:
    return {"verdict": "dropped" if reason else "kept", "reason": reason}


def _threshold(rows: Sequence[Row], cfg: SelectConfig, scores: Sequence[str], _: str) -> list[str | None]:
    """Each self-assessed score that was asked for strictly above C; where none was, all are kept."""
    fields = [(f"{name}_score", f"low_{name}") for name in scores]
    return [_first_miss(row, fields, "no_score", lambda score: score > cfg.threshold) for row in rows]


def _ppl(rows: Sequence[Row], cfg: SelectConfig, *_: object) -> list[str | None]:
    """Both perplexities strictly below the limit."""
    ppls = (("output_ppl", "high_output_ppl"), ("pair_ppl", "high_pair_ppl"))
    return [_first_miss(row, ppls, "no_ppl", lambda ppl: ppl < cfg.max_ppl) for row in rows]


def _first_miss(
    row: Row, fields: Sequence[tuple[str, str]], absent: str, passes: Callable[[float], bool]
) -> str | None:
    """The reason of the first field that fails: `absent` where it has no value, else its own; None if all pass."""
    for field, reason in fields:
        if row.get(field) is None:
            return absent
        if not passes(row[field]):
            return reason
    return None


def _density(rows: Sequence[Row], cfg: SelectConfig, scores: Sequence[str], key: str) -> list[str | None]:
    """One random row of each cluster."""
    return _one_of_each(rows, lambda cluster, places: random.Random(f"{key}/{cluster}").choice(places))


def _density_ppl(rows: Sequence[Row], *_: object) -> list[str | None]:
    """The row with the lowest pair_ppl of each cluster, the first of equals."""
    ppls = {place: row["pair_ppl"] for place, row in enumerate(rows) if row.get("pair_ppl") is not None}
    reasons = _one_of_each(rows, lambda _, places: min(places, key=lambda place: ppls.get(place, math.inf)))
    return [reason if place in ppls else "no_ppl" for place, reason in enumerate(reasons)]


def _one_of_each(rows: Sequence[Row], pick: Callable[[int, list[int]], int]) -> list[str | None]:
    """None for the one row of each cluster that `pick` (cluster, places of its rows) chooses, a reason for the rest."""
    clusters: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        clusters.setdefault(row["cluster"], []).append(place)
    chosen = {pick(cluster, places) for cluster, places in clusters.items()}
    return [None if place in chosen else "same_cluster" for place in range(len(rows))]


# method -> (rows, cfg, scores, key) -> for each row, in order, why it is dropped or None
METHODS: dict[str, Callable[[Sequence[Row], SelectConfig, Sequence[str], str], list[str | None]]] = {
    "threshold": _threshold,
    "ppl": _ppl,
    "density": _density,
    "density_ppl": _density_ppl,
}
