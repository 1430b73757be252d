"""A command of several ranks without a model, for test_ranks.py: it works, or fails, as `mode` says.

python -m tests.rank_workers launch NPROC FOLDER MODE TIMEOUT_S LOADING_S    starts the ranks
python -m tests.rank_workers rank   NPROC FOLDER MODE TIMEOUT_S LOADING_S    is one of them
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from isheep import ranks
from isheep.log import Events
from isheep.watch import Watch

ENDLESS = 100_000


def work(watch: Watch, folder: Path, steps: int, at: Callable[[int], None] | None = None) -> None:
    """`steps` collectives of all ranks in stage "answer"; `at(step)` comes before each."""
    import torch
    import torch.distributed as dist

    watch.enter("answer")
    if not ranks.is_follower():
        Events(folder / "events.jsonl").write("stage started", stage="answer", iteration=2)
    for step in range(steps):
        if at is not None:
            at(step)
        with watch.collective():
            dist.all_reduce(torch.ones(1))
        if step == 30:
            (folder / f"ready{ranks.rank()}").touch()
        time.sleep(0.01)


def command(watch: Watch, answer: str | None = None) -> str:
    """Rank 0 sends `answer`; a follower waits for it."""
    import torch.distributed as dist

    box = [answer]
    if ranks.is_follower():
        with watch.idle():
            dist.broadcast_object_list(box)
    else:
        dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def run(folder: Path, mode: str, timeout_s: float, loading_s: float) -> None:
    me = ranks.rank()
    (folder / f"pid{me}").write_text(str(os.getpid()))
    if mode == "early mistake":
        raise UserMistake("no such model.")
    watch = ranks.init(timeout_s, loading_s, "cpu")
    if mode in ("slow", "loading"):
        (folder / f"ready{me}").touch()
        time.sleep(1.0)
    if mode == "slow":
        if me == 0:
            watch.enter("files")
            time.sleep(1.5 * timeout_s)  # the others wait for a command longer than they wait in a collective
        assert command(watch, "go on") == "go on"
        assert watch.stage == "files"
    if mode == "mistake":
        if me == 0:
            watch.enter("files")
            raise UserMistake("no such file.")
        command(watch)

    def at(step: int) -> None:
        if step == 5 and me == 1 and mode == "memory":
            raise MemoryError
        while step == 5 and me == 1 and mode == "hang":
            time.sleep(0.1)
        if step == 5 and me == 1 and mode == "slow":  # a pass of many layers, for which the others wait
            with watch.collective():
                for _ in range(10):
                    time.sleep(timeout_s / 5)
                    watch.progress()

    work(watch, folder, ENDLESS if mode == "endless" else 40, at)
    ranks.shutdown()
    if me == 0:
        print("done")


class UserMistake(ValueError):
    pass


def main() -> int:
    what, nproc, folder, mode, timeout_s, loading_s = sys.argv[1:]
    out = Path(folder)
    if what == "launch":
        argv = ["rank", *sys.argv[2:]]
        return ranks.launch(int(nproc), argv, out, float(timeout_s), module="tests.rank_workers")
    try:
        run(out, mode, float(timeout_s), float(loading_s))
    except (Exception, KeyboardInterrupt) as error:
        ranks.fail(error, str(error) if isinstance(error, UserMistake) else None, "take a smaller model.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
