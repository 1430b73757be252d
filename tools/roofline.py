"""The roofline of a kernel benchmark: each op's operations a second over its operations a byte, below the chip's limit.

    python -m isheep_kernels.bench --csv rows.csv && python tools/roofline.py rows.csv docs/roofline.svg

Needs the extra "plots". Rows without times, from a machine without a GPU, lie on the limit itself.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]


class Roofline(NamedTuple):
    """Operations a byte and operations a second of each op's rows, and the chip's (operations, bytes) a second."""

    points: dict[str, list[tuple[float, float]]]
    peak: float
    bandwidth: float
    measured: bool


def read(rows: list[Row]) -> Roofline:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        flops, num_bytes = float(row["GFLOP"]) * 1e9, float(row["MB"]) * 1e6
        seconds = float(row.get("ours µs") or row["limit µs"]) / 1e6
        points[row["op"]].append((flops / num_bytes, flops / seconds))
    peak, bandwidth = rate(rows, "arithmetic", "GFLOP", 1e9), rate(rows, "memory", "MB", 1e6)
    return Roofline(points, peak, bandwidth, any(row.get("ours µs") for row in rows))


def rate(rows: list[Row], by: str, unit: str, scale: float) -> float:
    """What a second is worth in the limits of the rows that are bound so; of the longest, which is rounded least."""
    limits = [(float(row["limit µs"]) / 1e6, float(row[unit]) * scale) for row in rows if row["by"] == by]
    if not limits:
        raise SystemExit(f"no row is bound by {by}: the picture needs both kinds, so take more ops")
    seconds, amount = max(limits)
    return amount / seconds


def draw(roofline: Roofline, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot as plt

    points, peak, bandwidth, measured = roofline
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for op, found in points.items():
        axes.loglog(*zip(*found), "o", ms=5, alpha=0.7, label=op)
    intensities = [x for found in points.values() for x, _ in found]
    xs = [min(intensities), peak / bandwidth, max(intensities)]
    axes.loglog(xs, [min(peak, x * bandwidth) for x in xs], "k-", lw=1, label="limit")
    axes.set(xlabel="operations a byte", ylabel="operations a second")
    axes.set_title("measured" if measured else "nothing measured: what the data sheet allows")
    axes.legend(fontsize=8)
    figure.savefig(target)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    with source.open(newline="") as file:
        draw(read(list(csv.DictReader(file))), target)


if __name__ == "__main__":
    main()
