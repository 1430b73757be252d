"""The kernels against the limit of the chip and against their rivals.

    [ISHEEP_KERNELS=hopper] python -m isheep_kernels.bench [op …] [--models qwen1.5-7b …] [--chip h200|h100|a100|a800]
        [--csv FILE]

Without a GPU it prints, for each op and shape, the floating-point operations and bytes that the work cannot do without
and the time that the named chip's data sheet allows: a limit, nothing measured. With one it first compares the op with
its definition, stops where that fails, and then times it, in bf16, in turns with its rivals and with what the chip
does in the same run: streaming, and a large product. Ratios are of neighbouring turns; the band holds 20 to 80 % of
them. A rival that does not run here is left out, with its reason. Last come the goals, each with what was seen of it.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from isheep_kernels.cases import GOALS, MODELS, OPS, Case, Inputs, outputs, randn
from isheep_kernels.rivals import Function


class Chip(NamedTuple):
    """A data sheet, or what was seen: dense bf16 operations and bytes of memory a second."""

    flops: float
    bytes: float


CHIPS = {
    "h200": Chip(989e12, 4.8e12),
    "h100": Chip(989e12, 3.35e12),
    "a100": Chip(312e12, 2.04e12),
    "a800": Chip(312e12, 2.04e12),
}


class Band(NamedTuple):
    """The median of some ratios, and where 20 and 80 % of them lie."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Iterable[float]) -> "Band":
        ratios = list(ratios)
        low, *_, high = quantiles(ratios, n=5, method="inclusive")
        return cls(median(ratios), low, high)

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f}–{self.high:.3f})"


Row = dict[str, str | Band]

# ---- checking and timing ---------------------------------------------------------------------------------------------


def ready(case: Case, function: Function, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """The call that is compared and timed. A forward pass that is not part of it has been made."""
    given = {name: x for name, x in inputs.items() if name != "dys"}

    def gradients(ys: list[Tensor]) -> list[Tensor]:
        leaves = [given[name] for name in case.trained]
        return list(torch.autograd.grad(ys, leaves, inputs["dys"], allow_unused=True))  # a floor leaves some out

    def both() -> list[Tensor]:
        ys = outputs(function(**given))
        return ys + gradients(ys)

    if case.passes == "both":
        return both
    if case.passes == "backward":
        return partial(gradients, outputs(function(**given)))
    return lambda: outputs(function(**given))


def is_right(case: Case, inputs: Inputs) -> bool:
    """Whether ours is no further from the definition in fp32 than twice what the definition in bf16 is."""

    def wide(x: Any) -> Any:
        if isinstance(x, list):
            return [wide(each) for each in x]
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().float().requires_grad_(x.requires_grad) if floating else x

    truth = ready(case, case.reference, {name: wide(x) for name, x in inputs.items()})()
    got, ref = (ready(case, function, inputs)() for function in (case.ours, case.reference))
    for ours, theirs, true in zip(got, ref, truth, strict=True):
        allowed = 2 * (theirs.float() - true).abs().max()
        floor = torch.finfo(ours.dtype).eps / 2 * true.abs().max()
        if not (ours.float() - true).abs().max() <= torch.maximum(allowed, floor):
            return False
    return True


def gpu_seconds(function: Callable[[], Any]) -> float:
    """One call on a cold cache. The GPU is busy before, so that launches are queued and their work alone is timed."""
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(clocks: dict[str, Callable[[], float]], rounds: int = 30) -> dict[str, list[float]]:
    """What each clock says in each round, forwards and backwards through them by turns, after a round unseen."""
    names = list(clocks)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names[::-1] if i % 2 else names:
            took = clocks[name]()
            if i:
                times[name].append(took)
    return times


def ceilings() -> Chip:
    """What this GPU does now: a product of 8192³ in bf16, and a gigabyte copied or read, whichever streams faster."""
    x, source = randn(8192, 8192), torch.zeros(1 << 28, device="cuda")
    calls = {"product": partial(torch.mm, x, x), "copy": source.clone, "read": source.sum}
    times = in_turns({name: partial(gpu_seconds, call) for name, call in calls.items()})
    took = {name: median(each) for name, each in times.items()}
    num_bytes = source.nbytes
    return Chip(2 * 8192**3 / took["product"], max(2 * num_bytes / took["copy"], num_bytes / took["read"]))


# ---- rows ------------------------------------------------------------------------------------------------------------


def limit(case: Case, chip: Chip) -> float:
    """Seconds that the chip needs at least."""
    return max(case.flops / chip.flops, case.bytes / chip.bytes)


def counted(case: Case, chip: Chip) -> Row:
    bound = "arithmetic" if case.flops / chip.flops > case.bytes / chip.bytes else "memory"
    counts = {"GFLOP": f"{case.flops / 1e9:.2f}", "MB": f"{case.bytes / 1e6:.1f}"}
    names = {"op": case.op, "goal": case.goal, "shape": case.shape}
    return names | counts | {"limit µs": f"{limit(case, chip) * 1e6:.1f}", "by": bound}


def measured(case: Case, chip: Chip) -> Row:
    """Ours in µs and as a fraction of the same run's limit, and how often ours fits into each rival's time.

    ArithmeticError where ours is wrong.
    """
    inputs = case.inputs()
    if not is_right(case, inputs):
        raise ArithmeticError(f"{case.op} {case.shape} is wrong")
    functions = {"ours": case.ours} | {name: rival for name, rival in case.rivals.items() if runs(case, name, inputs)}

    def clock(function: Function) -> float:
        return gpu_seconds(ready(case, function, inputs))

    times = in_turns({name: partial(clock, function) for name, function in functions.items()})
    ours = times["ours"]
    row = counted(case, chip) | {"ours µs": f"{median(ours) * 1e6:.1f}"}
    row["of the limit"] = Band.of(limit(case, chip) / o for o in ours)
    for rival in case.rivals:
        ratios = [t / o for t, o in zip(times.get(rival, ()), ours)]
        row[f"{rival} / ours"] = Band.of(ratios) if ratios else "left out"
    return row


def runs(case: Case, rival: str, inputs: Inputs) -> bool:
    """Whether a rival runs here on these inputs. If not, it has said why."""
    try:
        ready(case, case.rivals[rival], inputs)()
        return True
    except Exception as reason:  # whatever other people's code may raise: it costs the row a column, not the run
        leave_out(case.op, rival, f"{type(reason).__name__}: {next(iter(str(reason).splitlines()), '')}")
        return False


@cache  # so that a reason is given once
def leave_out(op: str, rival: str, reason: str) -> None:
    print(f"{op}: {rival} is left out: {reason}", file=sys.stderr)


def release() -> None:
    """Give back what a case took: its memory, and compiled code, of which torch keeps but eight shapes a function."""
    torch.compiler.reset()
    torch.cuda.empty_cache()


# ---- what is printed -------------------------------------------------------------------------------------------------


class Table:
    """Markdown, row by row, with a header wherever the columns change."""

    def __init__(self) -> None:
        self.columns: list[str] = []

    def add(self, row: Row) -> None:
        if self.columns != list(row):
            self.columns = list(row)
            print(f"\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


def print_goals(rows: list[Row]) -> None:
    """Each goal, beside the median of its rows and the worst of them."""
    table = Table()
    for name, goal in GOALS.items():
        bands = (row.get(goal.column) for row in rows if row["goal"] == name)
        seen = [band.middle for band in bands if isinstance(band, Band)]
        found = (f"{median(seen):.3f}", f"{min(seen):.3f}", str(len(seen))) if seen else ("not measured", "", "0")
        asked = {"goal": name, "ratio": goal.column, "asked, at least": f"{goal.at_least:.3f}"}
        table.add(asked | dict(zip(("seen, median", "worst", "shapes"), found, strict=True)))


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def this_chip(data_sheet: str) -> tuple[Chip, Callable[[Case, Chip], Row]]:
    """The chip that limits are of, with what makes a row for it; says which on stdout."""
    if torch.cuda.is_available():
        chip, row = ceilings(), measured
        versions = f"torch {torch.__version__}, triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}"
        asked = f", ISHEEP_KERNELS={choice}" if (choice := os.environ.get("ISHEEP_KERNELS")) else ""
        print(f"{torch.cuda.get_device_name()}, {versions}{asked}", end=", this run: ")
    else:
        chip, row = CHIPS[data_sheet], counted
        print(f"No GPU here: nothing is measured. What the data sheet of an {data_sheet} allows", end=": ")
    print(f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bytes / 1e12:.2f} TB/s")
    return chip, row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(OPS)}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose shapes; default: all")
    parser.add_argument("--chip", choices=CHIPS, default="h200", help="the limit's chip, where no GPU is at hand")
    parser.add_argument("--csv", type=Path, help="write the rows there as well, after each of them")
    args = parser.parse_args()
    if unknown := set(args.ops) - set(OPS):
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    chip, row = this_chip(args.chip)
    table, rows = Table(), []
    for case in (case for op in args.ops or OPS for name in args.models for case in OPS[op](name, MODELS[name])):
        try:
            rows.append(row(case, chip))
        except ArithmeticError as wrong:
            print(f"{wrong}: it is not timed, and nothing after it", file=sys.stderr)
            return 1
        table.add({name: value for name, value in rows[-1].items() if name != "goal"})
        if args.csv:
            write_csv(args.csv, rows)
        release()
    print_goals(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
