"""The driver on several gloo ranks: the same rows as alone, failures in every stage, other numbers of ranks."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.test_run import ENV, command, given  # noqa: F401  (a fixture)
from tools.kill_demo import TIMED

# A bigram table as a model has gradients in the thousands: small steps keep ranks' rounding from growing through Adam.
STEADY = ("--set", "train.learning_rate=1e-7")
ROUNDED = ("train_log.jsonl", "measures.jsonl", "selected.jsonl")
MARK = "ISHEEP_TEST_RUN"
STAGES = ("instruct", "answer", "assess", "measure", "train")


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def alone(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run(command(given, "--out", out, *STEADY))
    assert done.returncode == 0, done.stderr
    return out


def assert_same_run(found: Path, expected: Path, iterations: int = 2) -> None:
    """Every record of every stage is the same; losses and measures are, but for rounding."""
    for iteration in range(1, iterations + 1):
        folders = [run / f"iter{iteration}" for run in (found, expected)]
        names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert names[0] == names[1]
        for name in (name for name in names[0] if name.endswith((".jsonl", ".json")) and name != TIMED):
            ours, theirs = ((folder / name).read_text() for folder in folders)
            if name in ROUNDED:
                for row, other in zip(ours.splitlines(), theirs.splitlines(), strict=True):
                    assert_same_row(json.loads(row), json.loads(other))
            else:
                assert ours == theirs, name


def assert_same_row(row: dict[str, Any], other: dict[str, Any]) -> None:
    numbers = {key: row.pop(key) for key in list(row) if isinstance(row[key], float)}
    assert numbers == pytest.approx({key: other.pop(key) for key in numbers}, rel=1e-3)
    assert row == other


@pytest.mark.parametrize("mesh", [("--shard", 2), ("--replicate", 2)])
def test_two_ranks_end_in_the_same_rows_and_losses(given: Path, alone: Path, tmp_path: Path, mesh: tuple) -> None:  # noqa: F811
    done = run(command(given, "--out", tmp_path / "run", *STEADY, *mesh))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)


def test_torchrun_starts_it_too(given: Path, alone: Path, tmp_path: Path) -> None:  # noqa: F811
    """And a folder begun by two ranks is prolonged by one."""
    line = command(given, "--out", tmp_path / "run", *STEADY)
    started = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    done = run([sys.executable, *started, *line[1:], "--iterations", "1"])
    assert done.returncode == 0, done.stderr
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_fails_in_any_stage_ends_all_and_the_run_goes_on(
    given: Path, alone: Path, tmp_path: Path, how: signal.Signals  # noqa: F811
) -> None:  # fmt: skip
    """One run, failing in one stage after the other, ended at last by a single rank."""
    out = tmp_path / "run"
    line = command(given, "--out", out, *STEADY, "--rank-timeout", 3, "--iterations", 1)
    for stage in STAGES:
        with two_ranks([*line, "--shard", "2"], str(out)) as process:
            await_stage(process, out, stage)
            started = time.monotonic()
            os.kill(ranks_of(str(out))[1], how)
            _, err = process.communicate(timeout=60)
            took_s = time.monotonic() - started
        told = [row for row in err.splitlines() if "rank 1" in row]
        assert process.returncode == 3 and len(told) == 1 and "Traceback" not in err, err
        reached = "|".join(STAGES[STAGES.index(stage) :])  # a run may be faster than the signal
        assert re.search(rf"rank 1 on {re.escape(platform.node())} .*in stage ({reached}) of iteration 1", told[0]), (
            told
        )
        assert "the same command resumes" in told[0]
        assert took_s < 30, "3 s of silence, and the time to end on a busy machine"
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, alone, iterations=1)


def test_a_stopped_rank_ends_a_command_without_stages_too(given: Path, tmp_path: Path) -> None:  # noqa: F811
    """The patience of loading is over once the model is there."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "amber {i}"}}\n' for i in range(8)))
    flags = ["--prompts", "rows.jsonl", "--out", "out.jsonl", "--max-tokens", "3000", "--ignore-eos"]
    line = [sys.executable, "-m", "isheep.sampler", "--model", str(given / "parrot"), "--dtype", "float32", *flags]
    mark = str(tmp_path)
    with two_ranks([*line, "--shard", "2", "--rank-timeout", "3"], mark, tmp_path) as process:
        while process.poll() is None and not (tmp_path / "out.jsonl").exists():
            time.sleep(0.01)
        os.kill(ranks_of(mark)[1], signal.SIGSTOP)
        _, err = process.communicate(timeout=60)
    told = [row for row in err.splitlines() if "rank 1" in row]
    assert process.returncode == 3 and len(told) == 1 and "for 3 s in stage after loading" in told[0], err


@contextmanager
def two_ranks(line: list[str], mark: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command, of which nothing is left at the end; `mark` is in the environment of all its processes."""
    env = {**ENV, MARK: mark}
    process = subprocess.Popen(line, env=env, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
        assert ranks_of(mark) == {}, "a rank outlived its launcher"
    finally:
        for pid in [*ranks_of(mark).values(), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks_of(mark: str) -> dict[int, int]:
    """Rank -> process of the ranks that live under this mark."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = dict(text.partition("=")[::2] for text in file.read_text(errors="replace").split("\0"))
            if variables.get(MARK) == mark and "RANK" in variables:
                found[int(variables["RANK"])] = int(file.parent.name)
    return found


def await_stage(process: subprocess.Popen[str], out: Path, stage: str) -> None:
    """Wait until this start of the run is in this stage of iteration 1."""
    events = out / "events.jsonl"
    seen = len(events.read_text().splitlines()) if events.exists() else 0
    while process.poll() is None:
        rows = [json.loads(r) for r in events.read_text().splitlines()[seen:]] if events.exists() else []
        if any(row["event"] == "stage started" and row["stage"] == stage for row in rows):
            return
        time.sleep(0.002)
    raise AssertionError(f"{stage} was never begun: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.parametrize(("module", "mesh"), [("sampler", "--replicate"), ("score", "--shard"), ("train", "--shard")])
def test_every_command_takes_the_flags(given: Path, tmp_path: Path, module: str, mesh: str) -> None:  # noqa: F811
    rows = [{"id": str(i), "instruction": f"Say {i}.", "input": "", "output": "amber " * i} for i in range(1, 8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"sampler": ["--prompts", "rows.jsonl", "--max-tokens", "9"], "score": ["--data", "rows.jsonl"],
             "train": ["--data", "rows.jsonl", "--set", "epochs=1", "--set", "val_share=0"]}[module]  # fmt: skip
    line = [sys.executable, "-m", f"isheep.{module}", "--model", str(given / "parrot"), "--dtype", "float32", *flags]
    found = []
    for out, more in (("alone", []), ("two", [mesh, "2"])):
        done = subprocess.run([*line, "--out", out, *more], env=ENV, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        file = tmp_path / out / "train_log.jsonl" if module == "train" else tmp_path / out
        found.append(sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row.get("id", "")))
    for row, other in zip(*found, strict=True):
        for each in (row, other):
            each.pop("num_cached_tokens", None)  # who has computed a shared prefix before is a matter of batches
        assert_same_row(row, other)
