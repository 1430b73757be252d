"""How commands end, and what their common flags mean."""

import argparse
import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isheep.cli import add_model_args, named_folder, pick_device, run_main
from isheep.config import UserError


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("no such model.")), 2, "error: no such model.\n"),
        (raising(KeyboardInterrupt()), 130, "stopped; the same command resumes\n"),
        (raising(OSError(errno.ENOSPC, "full", "runs/x")), 2, "error: no space left to write runs/x"),
        (raising(PermissionError(errno.EACCES, "no", "runs/x")), 2, "error: cannot use runs/x (permission denied)"),
        (raising(MemoryError()), 2, "error: the memory is not enough"),
        (raising(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), 2, "error: the memory is not enough"),
    ],
)
def test_exit_code_and_message(
    main: Callable[[], int | None], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    out, err = capsys.readouterr()
    assert exit_.value.code == code
    assert out == ""
    assert err.startswith(message) and err.count("\n") == bool(message)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EIO, "disk"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_main(raising(error))


def test_flags_of_every_command() -> None:
    parser = argparse.ArgumentParser()
    add_model_args(parser)
    args = parser.parse_args("--model m --adapter a --adapter b=c --set x=1 --set y=2".split())
    assert (args.adapter, args.set, args.seed, args.dtype, args.device) == (
        ["a", "b=c"],
        ["x=1", "y=2"],
        0,
        "bfloat16",
        "auto",
    )
    assert parser.parse_args(["--model", "m"]).adapter == []
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--model", "m", "--dtype", "bf16"])


def test_adapters_are_named(tmp_path: Path) -> None:
    (tmp_path / "r=8").mkdir()
    assert named_folder(f"one={tmp_path}") == ("one", tmp_path)
    assert named_folder(str(tmp_path)) == (str(tmp_path), tmp_path)
    assert named_folder(str(tmp_path / "r=8")) == (str(tmp_path / "r=8"), tmp_path / "r=8")
    with pytest.raises(UserError, match="absent is not a folder"):
        named_folder(f"one={tmp_path / 'absent'}")


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match='device "tpu9" is not known'):
        pick_device("tpu9")
    with pytest.raises(UserError, match='device "cuda:99" is not here'):
        pick_device("cuda:99")


def test_kernels_that_are_not_there_are_refused_before_the_model_is_read(monkeypatch):
    monkeypatch.setenv("ISHEEP_KERNELS", "cuda")
    with pytest.raises(UserError, match='ISHEEP_KERNELS is "cuda" and can be torch, hopper, or be left out'):
        pick_device("cpu")


def test_help_needs_no_torch() -> None:
    """A mistyped flag or --help answers at once: torch takes seconds to import."""
    program = "import sys, isheep.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0
