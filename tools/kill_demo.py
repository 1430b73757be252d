"""Fault injection: a run that is killed at random moments ends in the same bytes as one that was never stopped.

    python tools/kill_demo.py --out runs/kill

runs the loop on the real model with configs/demo.toml in float32 at a smaller size: once from start to end, then again
with SIGKILL at ten random moments and a restart after each. Every file of every iteration that holds no time is
compared. tests/test_run.py does the same on a tiny model.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMED = "train_summary.json"  # seconds and tokens/s are no result
SMALLER = (
    *("dtype=float32", "instruct.data_size=24", "instruct.max_prompts=12", "instruct.max_tokens=200"),
    *("answer.max_tokens=40", "select.threshold=0.5", "train.batch_size=1", "train.checkpoint_steps=2"),
)


class Outcome(NamedTuple):
    num_kills: int
    num_files: int
    differing: list[str]


def kill_and_compare(command: Sequence[str], out: Path, num_kills: int, seed: int, env: dict[str, str]) -> Outcome:
    """`command` lacks its --out: it runs into out/whole undisturbed, and into out/killed with SIGKILLs.

    The moments are uniform over the run's progress, so that every stage is likely to be hit whatever its speed.
    """
    whole, killed = out / "whole", out / "killed"
    _run([*command, "--out", str(whole)], env)
    draw = random.Random(seed)
    num_done = 0
    moments = sorted(draw.uniform(0, progress(whole)) for _ in range(num_kills))
    for n, moment in enumerate(moments):
        if not _kill_at([*command, "--out", str(killed)], killed, moment, draw.uniform(0, 0.1), env):
            break  # it came to its end first
        print(f"kill {n + 1} at {progress(killed)} of {progress(whole)} rows", file=sys.stderr)
        num_done = n + 1
    _run([*command, "--out", str(killed)], env)
    left, right = digests(whole), digests(killed)
    differing = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    return Outcome(num_done, len(left), differing)


def _run(command: Sequence[str], env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def _kill_at(command: Sequence[str], folder: Path, moment: float, delay_s: float, env: dict[str, str]) -> bool:
    """Start the run and kill it once it has started anew and its rows have passed `moment`; False if it ended first."""
    events = folder / "events.jsonl"
    num_events = events.stat().st_size if events.exists() else 0
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        started = events.exists() and events.stat().st_size > num_events
        if started and progress(folder) >= moment:
            time.sleep(delay_s)
            break
        time.sleep(0.005)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not ended


def progress(folder: Path) -> int:
    """Rows that a run has written so far, finished or not."""
    files = [*folder.glob("iter*/*.jsonl"), *folder.glob("iter*/*.jsonl.part")]
    return sum(_num_lines(path) for path in files)


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:  # sealed between the listing and now
        return 0


def digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of each iteration."""
    files = [path for path in folder.glob("iter*/**/*") if path.is_file() and path.name != TIMED]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="a folder that is not there yet, for both runs")
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for isheep.run")
    args = p.parse_args()
    settings = [word for text in (*SMALLER, *args.set) for word in ("--set", text)]
    command = [sys.executable, "-m", "isheep.run", "--model", "smollm2-135m", "--config", "configs/demo.toml"]
    outcome = kill_and_compare([*command, *settings], args.out.resolve(), args.kills, args.seed, dict(os.environ))
    print(f"{outcome.num_kills} kills, {outcome.num_files} files, differing: {outcome.differing or 'none'}")
    return 1 if outcome.differing else 0


if __name__ == "__main__":
    sys.exit(main())
