"""Several ranks as one command: starting them, joining them, and one sentence when one of them fails.

`launch` starts a rank per GPU on this machine; `torchrun --nnodes N ... -m isheep.run ...` does on several. In each
rank `init` joins the others and sets the watch. Rank 0 drives; the others follow its commands. A rank ends with 0, with
2 for a user's mistake, or with 3 when it or another failed; after 2 and 3 the reason has been said.
"""

import atexit
import json
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from isheep.watch import FAILED, GRACE_S, LOADING, RESUMES, Watch, verdict

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT_S = 60.0  # how long a rank may be silent, or awaited by the others
LOADING_S = 1800.0  # the same, while weights are read
USER_MISTAKE, STOPPED = 2, 130
RUN_ID = "isheep"  # by which a rank knows who started it
SHUTDOWN_S = 10  # from SIGTERM to SIGKILL, when the launcher is stopped
LOST_PEER = ("gloo", "NCCL", "closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")

_watch: Watch | None = None  # this process's own; a process is in one group of ranks only


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of the ranks are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launched_here() -> bool:
    """Whether `launch` started this rank, and not the user with torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def is_follower() -> bool:
    return rank() != 0


def launch(
    nproc: int, argv: list[str], out: Path | None, timeout_s: float = TIMEOUT_S, module: str = "isheep.run"
) -> int:
    """Run `python -m module argv` as `nproc` ranks on this machine; the exit code of them all.

    `out` is the run folder, whose events tell the stage in which a rank died without a word. A rank that is still there
    `timeout_s` (10 at most) after Ctrl-C is killed.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // nproc)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name may not resolve
    _quiet()
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the agent's reports: from here on this process only waits
    # The ranks meet here, on a port that the system chose; the launcher's own store below is the same one.
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    store = PrefixStore("watch/0", server)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=RUN_ID,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{server.port}",
        rdzv_configs={"rank": 0, "timeout": 900},
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # Ctrl-C is Python's own; either way the ranks get SIGTERM
        shutdown_timeout=max(1, min(SHUTDOWN_S, round(timeout_s))),
    )
    started = time.time()
    try:
        elastic_launch(config, sys.executable)("-m", module, *argv)
        return 0
    except ChildFailedError as error:
        failures = {r: failure.exitcode for r, failure in error.failures.items()}
        return _exit_code(failures, store, out, started)
    except KeyboardInterrupt:
        code = STOPPED
    except SignalException as error:
        code = 128 + error.sigval
    if verdict(store) is None:
        print(f"stopped; {RESUMES.rstrip('.')}", file=sys.stderr)
    return code


def _exit_code(failures: dict[int, int], store: "Store", out: Path | None, started: float) -> int:
    """The exit code for `failures`, rank -> exit code, the first found first. Says what no rank could say itself."""
    end = verdict(store)
    if end is not None:
        return end["code"]
    for code in (USER_MISTAKE, FAILED):
        if code in failures.values():
            return code
    ended_by_launcher = (-signal.SIGTERM, 128 + signal.SIGTERM)
    first = next((r for r, code in failures.items() if code not in ended_by_launcher), next(iter(failures)))
    code, host = failures[first], os.uname().nodename
    how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    hint = " (often the kernel's out-of-memory killer)" if code == -signal.SIGKILL else ""
    stage = _stage(out, started)
    print(f"error: rank {first} on {host} {how}{hint} in stage {stage}; {RESUMES}", file=sys.stderr)
    return FAILED


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stage(out: Path | None, since: float) -> str:
    """The stage that the run in `out`, or one of the grid in `out`, has last started, after the time `since`."""
    stage, latest = LOADING, since - 1
    for file in (out / "events.jsonl", *out.glob("*/events.jsonl")) if out else ():
        with suppress(OSError, ValueError):  # a kill may have torn the last line
            for line in file.read_text().splitlines():
                event = json.loads(line)
                if event["event"] == "stage started" and event["time_s"] >= latest:
                    stage, latest = f"{event['stage']} of iteration {event['iteration']}", event["time_s"]
    return stage


def init(timeout_s: float = TIMEOUT_S, loading_s: float = LOADING_S, device: str = "auto") -> Watch:
    """Join the ranks that the environment names (torchrun's variables), and watch them from now on.

    `device` is cpu, cuda, or auto: CUDA where each rank of the machine has a device. What lies on the CPU goes over
    gloo. The watch ends a run that hangs; the backends' own timeouts are behind it.
    """
    global _watch
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_DFL if is_follower() else signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if is_follower() else _unwind)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = device == "cuda" or (device == "auto" and torch.cuda.device_count() >= local_world_size())
    if cuda:
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # its thread aborts the process; the watch explains
        torch.cuda.set_device(local_rank)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    loading, lost = timedelta(seconds=loading_s), timedelta(seconds=max(1.0, timeout_s))
    store = dist.TCPStore(host, port, is_master=holds, timeout=loading, wait_for_workers=False, multi_tenant=True)
    own = dist.TCPStore(host, port, is_master=False, timeout=lost, wait_for_workers=False)
    _watch = Watch(dist.PrefixStore(f"watch/{attempt}", own), rank(), world_size(), timeout_s, loading_s)
    _watch.start()
    atexit.register(_watch.stop)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore(f"group/{attempt}", store),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=4 * max(timeout_s, loading_s)),
    )
    return _watch


def shutdown() -> None:
    """Leave the others at a normal end."""
    import torch
    import torch.distributed as dist

    assert _watch is not None, "shutdown without init"
    with _watch.collective():
        dist.all_reduce(torch.zeros(1))  # over gloo: rank 0 may hold the store, so it does not leave before the rest
    _watch.close()
    dist.destroy_process_group()


def fail(error: BaseException, sentence: str | None, out_of_memory: str) -> NoReturn:
    """End this rank after `error`, its main thread's, with one sentence from all ranks together.

    `sentence` explains a user's mistake and is None for a bug, `out_of_memory` tells the way out of too little memory.
    What a lost peer causes is left to the launcher or the watch, who know more; a follower lets rank 0 speak first.
    """
    try:
        if isinstance(error, KeyboardInterrupt):
            raise error
        where = f"rank {rank()} on {os.uname().nodename}"
        stage = _watch.stage if _watch else LOADING
        if is_out_of_memory(error):
            _say(f"error: {where} ran out of memory in stage {stage}: {out_of_memory}", FAILED)
        if _is_lost_peer(error):
            _wait_for_the_end()
            _say(f"error: {where} lost the other ranks in stage {stage}; {RESUMES}", FAILED)
        if is_follower():
            time.sleep(GRACE_S)
        if sentence is not None:
            _say(f"error: {sentence}", USER_MISTAKE)
        trace = "".join(traceback.format_exception(error))
        _say(f"{trace}error: {where} failed in stage {stage}: {type(error).__name__}; {RESUMES}", FAILED)
    except KeyboardInterrupt:
        if not is_follower():
            print(f"stopped; {RESUMES.rstrip('.')}", file=sys.stderr, flush=True)
        os._exit(STOPPED)


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, or torch's in a RuntimeError: "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    )


def _is_lost_peer(error: BaseException) -> bool:
    """gloo's and NCCL's errors are RuntimeErrors, some of a class of their own (DistNetworkError, ...)."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__.startswith("Dist") or any(words in str(error) for words in LOST_PEER)


def _wait_for_the_end() -> None:
    """Stay until the launcher or the watch ends this process, or until both should have."""
    if _watch is None:
        time.sleep(GRACE_S)
        return
    with _watch.idle():
        time.sleep(_watch.timeout_s * 1.5 + 2 * GRACE_S)


def _say(text: str, code: int) -> NoReturn:
    sys.stdout.flush()
    if _watch is not None:
        _watch.say(text, code)
    print(text, file=sys.stderr, flush=True)
    os._exit(code)


def _quiet() -> None:
    """Keep torch's own remarks on a lost connection off stderr. It reads this when it is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _unwind(*_: object) -> NoReturn:
    """SIGTERM in rank 0: the stage's end still goes to the events. A second one ends it at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + signal.SIGTERM)


if world_size() > 1:
    _quiet()
