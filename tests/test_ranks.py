"""Several ranks as one command: whatever happens to one of them, all end in bounded time with one sentence."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isheep import ranks
from isheep.watch import RESUMES

ROOT = Path(__file__).parents[1]
HOST = platform.node()
SLOW_S = 45.0  # the longest that anything may take on a slow machine


@dataclass
class Command:
    """`nproc` ranks of tests/rank_workers.py, as a user would start them."""

    folder: Path
    mode: str
    nproc: int = 2
    timeout_s: float = 3.0
    loading_s: float = 30.0

    def start(self) -> "Command":
        flags = [str(self.nproc), str(self.folder), self.mode, str(self.timeout_s), str(self.loading_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_workers", "launch", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        return self

    def ready(self) -> "Command":
        """Wait until all ranks are at work."""
        until = time.monotonic() + SLOW_S
        while not all((self.folder / f"ready{rank}").exists() for rank in range(self.nproc)):
            assert time.monotonic() < until and self.process.poll() is None, "the ranks did not come to their work"
            time.sleep(0.05)
        return self

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid{rank}").read_text())

    def signal(self, rank: int, number: int) -> "Command":
        os.kill(self.pid(rank), number)
        self.signalled = time.monotonic()
        return self

    def end(self) -> tuple[int, list[str]]:
        """The exit code and stderr's lines; all ranks are gone."""
        out, err = self.process.communicate(timeout=SLOW_S)
        self.out = out
        self.ended = time.monotonic()
        for rank in range(self.nproc):
            if (self.folder / f"pid{rank}").exists():
                assert not alive(self.pid(rank)), f"rank {rank} is left behind"
        return self.process.returncode, err.splitlines()


Start = Callable[..., Command]


def alive(pid: int) -> bool:
    """A zombie that waits for init is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a folder of its own; some tests start two, whose waits then overlap."""
    started: list[Command] = []

    def start(mode: str, **settings: Any) -> Command:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Command(folder, mode, **settings))
        return started[-1].start()

    yield start
    for command in started:  # only a failed test leaves anything to end
        for rank in range(command.nproc):
            if (command.folder / f"pid{rank}").exists() and alive(command.pid(rank)):
                os.kill(command.pid(rank), signal.SIGKILL)
        command.process.kill()
        command.process.communicate()


def one_sentence(lines: list[str], *words: str) -> None:
    assert len(lines) == 1, "\n".join(lines)
    for word in words:
        assert word in lines[0], lines[0]


def test_a_slow_run_ends_well(start: Start) -> None:
    """A follower that loads, a driver that is busy, a pass of many layers: each longer than collectives may wait."""
    command = start("slow", timeout_s=2.0).ready().signal(1, signal.SIGSTOP)
    time.sleep(command.timeout_s + 1)
    command.signal(1, signal.SIGCONT)
    assert command.end() == (0, [])
    assert command.out == "done\n"


def test_a_killed_rank(start: Start) -> None:
    commands = [start("endless", timeout_s=20.0) for _ in range(2)]
    for rank, command in enumerate(commands):
        command.ready().signal(rank, signal.SIGKILL)
    for rank, command in enumerate(commands):
        code, lines = command.end()
        assert code == 3
        one_sentence(lines, f"rank {rank} on {HOST}", "SIGKILL", "out-of-memory", "answer of iteration 2", RESUMES)
        assert command.ended - command.signalled < 15


def test_a_stopped_rank(start: Start) -> None:
    """The driver at work, and a follower while loading, where the limit is longer."""
    driver, follower = start("endless"), start("loading", timeout_s=2.0, loading_s=4.0)
    follower.ready().signal(1, signal.SIGSTOP)
    driver.ready().signal(0, signal.SIGSTOP)
    for command, rank, limit_s, stage in ((driver, 0, 3, "answer"), (follower, 1, 4, "loading")):
        code, lines = command.end()
        assert code == 3
        one_sentence(lines, f"rank {rank} on {HOST} gave no sign of life for {limit_s} s in stage {stage}", RESUMES)
        assert limit_s < command.ended - command.signalled < 20


def test_a_hung_main_thread(start: Start) -> None:
    code, lines = start("hang", nproc=3).end()
    assert code == 3
    one_sentence(lines, f"rank 1 on {HOST} let the other ranks wait for 3 s in stage answer", "hangs", RESUMES)


def test_too_little_memory(start: Start) -> None:
    code, lines = start("memory").end()
    assert code == 3
    one_sentence(lines, f"rank 1 on {HOST}", "ran out of memory", "stage answer", "take a smaller model.")


@pytest.mark.parametrize(("mode", "sentence"), [("early mistake", "no such model."), ("mistake", "no such file.")])
def test_a_users_mistake_is_said_once(start: Start, mode: str, sentence: str) -> None:
    assert start(mode).end() == (2, [f"error: {sentence}"])


def test_ctrl_c(start: Start) -> None:
    command = start("endless", timeout_s=20.0).ready()
    command.process.send_signal(signal.SIGINT)
    assert command.end() == (130, ["stopped; the same command resumes"])


def test_ranks_whose_launcher_is_killed_or_stopped(start: Start) -> None:
    commands = start("endless"), start("endless")
    for command, number in zip(commands, (signal.SIGKILL, signal.SIGSTOP)):
        command.ready().process.send_signal(number)
    for command in commands:
        until = time.monotonic() + SLOW_S
        while any(alive(command.pid(rank)) for rank in range(2)):
            assert time.monotonic() < until
            time.sleep(0.05)
        command.process.send_signal(signal.SIGCONT)
        _, lines = command.end()
        one_sentence(lines, f"rank 0 on {HOST} lost its launcher", "stage answer", RESUMES)


def test_the_stage_is_the_last_that_started(tmp_path: Path) -> None:
    def write(*rows: tuple[str, float, str]) -> None:
        text = [json.dumps({"event": e, "time_s": t, "stage": s, "iteration": 1}) + "\n" for e, t, s in rows]
        (tmp_path / "events.jsonl").write_text("".join(text))

    assert ranks._stage(None, 0.0) == ranks._stage(tmp_path, 0.0) == "loading"
    write(("stage started", 5.0, "instruct"), ("stage finished", 7.0, "instruct"), ("stage started", 8.0, "answer"))
    assert ranks._stage(tmp_path, 4.0) == "answer of iteration 1"
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "stage st')  # torn by the kill
    assert ranks._stage(tmp_path, 4.0) == "answer of iteration 1"
    assert ranks._stage(tmp_path, 100.0) == "loading"  # those of the run before


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), True),
        (type("DistNetworkError", (RuntimeError,), {})("failed to recv"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_which_errors_come_from_a_lost_peer(error: Exception, lost: bool) -> None:
    assert ranks._is_lost_peer(error) is lost


def test_a_bug_keeps_its_traceback() -> None:
    code = "from isheep.ranks import fail; fail(KeyError('x'), None, '')"
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 3
    assert ended.stderr.startswith("KeyError: 'x'\n")  # it was never raised, so no "Traceback" above it
    one_sentence(ended.stderr.splitlines()[1:], f"error: rank 0 on {HOST}", "KeyError", RESUMES)


def test_help_does_not_wait_for_torch() -> None:
    code = "import isheep.ranks, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
