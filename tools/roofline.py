"""The roofline of a kernel benchmark: each op's operations a second over its operations a byte, below the chip's limit.

    python -m isheep_kernels.bench --csv rows.csv && python tools/roofline.py rows.csv docs/roofline.svg

Needs the extra "plots". Rows without times, from a machine without a GPU, lie on the limit itself.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no screen


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    rows = list(csv.DictReader(source.open()))
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        flops, num_bytes = float(row["GFLOP"]) * 1e9, float(row["MB"]) * 1e6
        seconds = float(row.get("ours µs") or row["limit µs"]) / 1e6
        points[row["op"]].append((flops / num_bytes, flops / seconds))
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for op, found in points.items():
        axes.loglog(*zip(*found), "o", ms=5, label=op)
    peak, bandwidth = ceilings(rows)
    intensities = [x for found in points.values() for x, _ in found]
    xs = [min(intensities), peak / bandwidth, max(intensities)]
    axes.loglog(xs, [min(peak, x * bandwidth) for x in xs], "k-", lw=1, label="limit")
    measured = any(row.get("ours µs") for row in rows)
    axes.set(xlabel="operations a byte", ylabel="operations a second")
    axes.set_title("measured" if measured else "nothing measured: what the data sheet allows")
    axes.legend(fontsize=8)
    figure.savefig(target)


def ceilings(rows: list[dict[str, str]]) -> tuple[float, float]:
    """(operations, bytes) a second that the rows' limits were computed with."""
    of = {
        by: [float(row[unit]) * scale / (float(row["limit µs"]) / 1e6) for row in rows if row["by"] == by]
        for by, unit, scale in (("arithmetic", "GFLOP", 1e9), ("memory", "MB", 1e6))
    }
    if not all(of.values()):
        raise SystemExit("the rows have only one kind of limit: take more ops")
    return max(of["arithmetic"]), max(of["memory"])


if __name__ == "__main__":
    main()
