"""Which assessed pairs are trained on: a table with one row per method of the paper (its filter ablation)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from isheep.config import SelectConfig

Row = Mapping[str, Any]


def select(rows: Sequence[Row], cfg: SelectConfig, scores: Sequence[str]) -> list[dict[str, Any]]:
    """`rows` with "verdict" ("kept" or "dropped") and "reason" (None for kept), in the same order.

    A row that an earlier stage dropped keeps its verdict and its reason; it takes no part in the selection. `scores`
    are those that were asked for, of "quality" and "following".
    """
    open_rows = [row for row in rows if row.get("verdict") != "dropped"]
    reasons = iter(METHODS[cfg.method](open_rows, cfg, scores))
    return [dict(row) if row.get("verdict") == "dropped" else {**row, **_verdict(next(reasons))} for row in rows]


def _verdict(reason: str | None) -> dict[str, str | None]:
    return {"verdict": "dropped" if reason else "kept", "reason": reason}


def _threshold(rows: Sequence[Row], cfg: SelectConfig, scores: Sequence[str]) -> list[str | None]:
    """Each self-assessed score that was asked for strictly above C; where none was, all are kept."""
    fields = [(f"{name}_score", f"low_{name}") for name in scores]
    return [_first_miss(row, fields, "no_score", lambda score: score > cfg.threshold) for row in rows]


def _ppl(rows: Sequence[Row], cfg: SelectConfig, _: Sequence[str]) -> list[str | None]:
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


# method -> (rows, cfg, scores) -> for each row, in order, why it is dropped or None
METHODS: dict[str, Callable[[Sequence[Row], SelectConfig, Sequence[str]], list[str | None]]] = {
    "threshold": _threshold,
    "ppl": _ppl,
}
