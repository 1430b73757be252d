"""A thread in every rank that ends the process when another rank is stopped, gone or hung, with one sentence for all.

Each rank beats: a count, its stage, and what its main thread does. Rank 0 watches all others, all others watch rank 0.
A beat that stands still means a stopped process or a dead machine. A main thread that waits too long in a collective
asks who has not come. Whoever finds the culprit first says so on stderr; the verdict in the store ends the others.

The thread has its own connection to the store: one connection serves one call at a time, and the main thread's may
block for minutes. Store calls and collectives release the GIL, so a rank that waits or computes goes on beating.
"""

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch.distributed import Store

FAILED = 3  # the exit code of a rank that failed, when it or another has said why
LOADING = "loading"  # the stage before the first
RESUMES = "the same command resumes."
SILENT = ("gave no sign of life", "stopped, killed, or its machine is gone")
ABSENT = ("let the other ranks wait", "its main thread hangs")
GRACE_S = 2.0  # what a rank waits for one that can say more
VERDICT, SPEAKERS, BEAT = "isheep/verdict", "isheep/speakers", "isheep/beat/"  # keys in the store


def verdict(store: "Store") -> dict[str, Any] | None:
    """{"code", "pid", "machine"} once a rank has said why all end, else None. The last two: whom to kill."""
    return json.loads(store.get(VERDICT)) if store.check([VERDICT]) else None


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself. `stage` is None in a follower that takes the driver's.

    `where` its main thread is: "busy", "idle" (waits for a command), in a "collective", or "left" at a normal end.
    """

    rank: int
    host: str
    machine: str
    pid: int
    count: int
    stage: str | None
    limit_s: float
    where: str
    progress: int


class Watch:
    """`store` is a connection for this object alone. `timeout_s` holds in a stage that sets no limit of its own."""

    def __init__(self, store: "Store", rank: int, world_size: int, timeout_s: float, loading_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.host, self._machine = platform.node(), _machine()
        self._store = store
        self._period = min(2.0, max(0.05, timeout_s / 20))
        self._stage: str | None = LOADING
        self._limit_s, self._loading_s = loading_s, loading_s
        self._where, self._progress = "busy", 0
        self._since = 0.0  # when the main thread went where it is
        self._clock = 0.0  # the seconds this thread was awake: a machine's sleep is nobody's fault
        self._count = 0
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}  # by the clock, when a rank's count last changed
        self._absent: tuple[float, list[int], dict[int, Beat]] | None = None  # since when no rank got on; all beats
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="guard", daemon=True)
        self._ending = threading.Lock()

    def start(self) -> None:
        self._thread.start()
        self._guard.start()

    @property
    def stage(self) -> str:
        return self._stage or self._driver().stage or LOADING

    def enter(self, stage: str, limit_s: float | None = None) -> None:
        """This rank begins `stage`, in which it may be silent or awaited for `limit_s`, by default `timeout_s`."""
        self._stage, self._limit_s = stage, limit_s or self.timeout_s
        self._wake.set()  # the others should know soon

    def progress(self) -> None:
        """The main thread has come one step further, within a collective too. `collective` calls it."""
        self._progress += 1
        self._since = self._clock

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around whatever waits for other ranks: one that stays away too long is named, and ends the run."""
        self.progress()
        with self._at("collective"):
            yield

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Around a follower's wait for a command, however long. From the first on it takes the driver's stages."""
        if self.rank != 0:
            self._stage, self._limit_s = None, self.timeout_s
        with self._at("idle"):
            yield

    @contextmanager
    def _at(self, where: str) -> Iterator[None]:
        before = self._where
        self._since, self._where = self._clock, where
        try:
            yield
        finally:
            self._since, self._where = self._clock, before

    def close(self) -> None:
        """Stop watching at a normal end; the others learn that the silence is meant."""
        self._where = "left"
        self.stop(10 * GRACE_S)

    def stop(self, patience_s: float = GRACE_S) -> None:
        """End the thread: an interpreter that ends under its feet, in a call to the store, aborts the process."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(patience_s)

    def say(self, sentence: str, code: int = FAILED, culprit: Beat | None = None) -> NoReturn:
        """Print `sentence`, unless another rank was first, and end every rank with `code`."""
        end = {"code": code, "pid": culprit and culprit.pid, "machine": culprit and culprit.machine}
        try:
            if self._store.add(SPEAKERS, 1) == 1:
                print(sentence, file=sys.stderr, flush=True)
                self._store.set(VERDICT, json.dumps(end))
            else:
                end = self._await_verdict() or end
        except RuntimeError:  # the store is lost, and with it all others who might speak
            print(sentence, file=sys.stderr, flush=True)
        self._end(end)

    def _await_verdict(self) -> dict[str, Any] | None:
        until = time.monotonic() + 2 * GRACE_S
        while (end := verdict(self._store)) is None and time.monotonic() < until:
            time.sleep(self._period)
        return end

    def _end(self, end: dict[str, Any]) -> NoReturn:
        """End this process, and on its machine the culprit: one that is stopped ignores all but SIGKILL."""
        time.sleep(2 * self._period)  # ranks elsewhere read the verdict before its store goes
        if end["machine"] == self._machine and end["pid"] != os.getpid():
            with suppress(OSError):
                os.kill(end["pid"], signal.SIGKILL)
        os._exit(end["code"])  # destroying communicators whose peers are gone may hang

    def _run(self) -> None:
        try:
            awake = time.monotonic()
            while not self._stop.is_set():
                self._write_beat()
                if (end := verdict(self._store)) is not None:
                    self._end(end)
                self._look_for_silent()
                self._look_for_absent()
                self._wake.wait(self._period)
                self._wake.clear()
                now = time.monotonic()
                self._clock += min(now - awake, max(1.0, 5 * self._period))
                awake = now
            self._write_beat()
        except RuntimeError:  # torch's DistNetworkError and DistStoreError among them
            self._lose_store()

    def _own_beat(self) -> Beat:
        now = (self._count, self._stage, self._limit_s, self._where, self._progress)
        return Beat(self.rank, self.host, self._machine, os.getpid(), *now)

    def _write_beat(self) -> None:
        self._count += 1
        self._store.set(f"{BEAT}{self.rank}", json.dumps(asdict(self._own_beat())))

    def _read_beats(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """Those of `ranks` that have begun to beat."""
        begun = [rank for rank in ranks if rank in self._beats or self._store.check([f"{BEAT}{rank}"])]
        found = self._store.multi_get([f"{BEAT}{rank}" for rank in begun]) if begun else []
        return {rank: Beat(**json.loads(text)) for rank, text in zip(begun, found)}

    def _driver(self) -> Beat:
        return self._own_beat() if self.rank == 0 else self._beats.get(0, self._own_beat())

    def _look_for_silent(self) -> None:
        watched = range(1, self.world_size) if self.rank == 0 else (0,)
        for rank, beat in self._read_beats(watched).items():
            if rank not in self._beats or beat.count != self._beats[rank].count:
                self._heard[rank] = self._clock
            self._beats[rank] = beat
        for rank in watched:
            silent_s = self._clock - self._heard.get(rank, 0.0)
            if rank not in self._beats:
                if silent_s > self._loading_s:
                    self.say(f"error: rank {rank} did not start within {self._loading_s:g} s; {RESUMES}")
            elif self._beats[rank].where != "left" and silent_s > self._limit(self._beats[rank]):
                self._name(self._beats[rank], *SILENT)

    def _look_for_absent(self) -> None:
        """Where this main thread has waited too long in a collective, and no rank has got on: find who has not come.

        Half the limit passes before others are looked at, and as much again without a step forward of any of them.
        """
        half_s = self._limit(self._own_beat()) / 2
        if self._where != "collective" or self._clock - self._since <= half_s:
            self._absent = None
            return
        now = self._read_beats(range(self.world_size))
        steps = [beat.progress for beat in now.values()]
        if self._absent is None or self._absent[1] != steps:
            self._absent = (self._clock, steps, now)
        elif self._clock - self._absent[0] > max(half_s, 4 * self._period) and self._where == "collective":
            self._judge(self._absent[2], now)

    def _judge(self, before: dict[int, Beat], now: dict[int, Beat]) -> NoReturn:
        others = [beat for beat in now.values() if beat.rank != self.rank]
        silent = [beat for beat in others if beat.rank in before and before[beat.rank].count == beat.count]
        if silent:
            self._name(silent[0], *SILENT)
        found = next(
            (group for where in ("busy", "idle", "left") if (group := [b for b in others if b.where == where])),
            list(now.values()),
        )
        self._name(min(found, key=lambda beat: beat.progress), *ABSENT)

    def _limit(self, beat: Beat) -> float:
        return max(beat.limit_s, self._driver().limit_s)

    def _name(self, beat: Beat, what: str, why: str) -> NoReturn:
        took = f"for {self._limit(beat):g} s in stage {beat.stage or self.stage}"
        self.say(f"error: rank {beat.rank} on {beat.host} {what} {took} ({why}); {RESUMES}", FAILED, beat)

    def _watch_store(self) -> None:
        """Store calls know no time limit: where its process is stopped, or its machine gone, the beats stand still."""
        count, still_s = 0, 0.0
        while not self._stop.wait(self._period):
            count, still_s = self._count, still_s + self._period if count == self._count else 0.0
            if still_s > self._limit(self._own_beat()):
                self._lose_store()

    def _lose_store(self) -> None:
        """The process that holds the store is gone or stopped: one rank on each machine says so."""
        if self._stop.wait(GRACE_S) or not self._ending.acquire(blocking=False):
            return  # this is the end already, or its launcher's
        held_by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if os.environ.get("LOCAL_RANK", "0") == "0" or (held_by_rank_0 and self.rank == 1):
            lost = "rank 0" if held_by_rank_0 else "its launcher"
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            sentence = f"error: rank {self.rank} on {self.host} lost {lost} ({where}) in stage {self.stage}; {RESUMES}"
            print(sentence, file=sys.stderr, flush=True)
        driver = self._driver()
        self._end({"code": FAILED, "pid": driver.pid, "machine": driver.machine if held_by_rank_0 else None})


def _machine() -> str:
    """Where a process number means the same process: this boot of this machine, in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()
