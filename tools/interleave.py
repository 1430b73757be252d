"""Contenders that take turns: each in a live process of its own, so that a busy machine slows them alike.

A worker answers each line on stdin with one JSON line: "go" makes one timed round {"seconds", "tokens", "check"},
"peak" asks for its peak memory so far. Used by bench_train.py and bench_score.py.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Round(NamedTuple):
    tokens: int  # that the round is credited with
    check: float  # a number that all contenders must agree on


def serve(play: Callable[[], Round], device: str = "cpu") -> None:
    """A worker's main loop. One round is played, untimed, before the first is asked for. A round ends in sync."""
    play()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "peak":
            answer: dict[str, Any] = {"peak_gib": peak_gib(device)}
        else:
            started = time.perf_counter()
            done = play()
            answer = {"seconds": time.perf_counter() - started, "tokens": done.tokens, "check": done.check}
        print(json.dumps(answer), flush=True)


def peak_gib(device: str) -> float:
    """Of the process's memory or, on a GPU, of what its tensors take there."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    import torch

    return torch.cuda.max_memory_allocated() / 2**30


class Worker:
    """A live contender: `command` runs a program that calls `serve`."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended early")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def contest(commands: dict[str, list[str]], rounds: int, tolerance: float) -> None:
    """Let them take turns and print a table; every ratio is to the first contender's time in the same turn.

    Ends with an error where the first check numbers differ by more than `tolerance`, relatively.
    """
    workers = {name: Worker(command) for name, command in commands.items()}
    played: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            played[name].append(worker.ask("go"))
    peaks = {name: worker.ask("peak")["peak_gib"] for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    first, *_ = played
    checks = {name: each[0]["check"] for name, each in played.items()}
    print("checks: " + ", ".join(f"{name} {value:.5f}" for name, value in checks.items()))
    if any(abs(value - checks[first]) > tolerance * abs(checks[first]) for value in checks.values()):
        raise SystemExit("the contenders do not compute the same: no result")
    print("| contender | tok/s | s, median (min–max) | peak GiB | times as long as the first, median (20–80 %) |")
    print("|---|---|---|---|---|")
    for name, each in played.items():
        times = [r["seconds"] for r in each]
        ratios = sorted(t / f["seconds"] * f["tokens"] / r["tokens"] for t, f, r in zip(times, played[first], each))
        low, high = ratios[round(0.2 * (rounds - 1))], ratios[round(0.8 * (rounds - 1))]
        middle = statistics.median(times)
        print(
            f"| {name} | {each[0]['tokens'] / middle:.0f} | {middle:.2f} ({min(times):.2f}–{max(times):.2f}) "
            f"| {peaks[name]:.2f} | {statistics.median(ratios):.2f} ({low:.2f}–{high:.2f}) |"
        )
