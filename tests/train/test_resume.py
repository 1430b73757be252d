"""A training that is killed at any moment and started again ends in the bytes of one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from isheep.config import TrainConfig, UserError
from isheep.model.lora import LoRAConfig, attach
from isheep.train.data import Example
from isheep.train.trainer import TrainSummary, train
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
STEPS = 20
TIMES = ("time_s", "tok_per_s", "peak_gib")


def rows(num: int, seed: int) -> list[Example]:
    rng = random.Random(seed)
    return [Example(tuple(rng.randrange(320) for _ in range(rng.randint(4, 40))), 2) for _ in range(num)]


def run(out: Path, **changes: Any) -> TrainSummary:
    """Twenty steps with everything on that could go differently a second time."""
    defaults: dict[str, Any] = {"epochs": 2.0, "batch_size": 2, "cutoff": 40, "pack_tokens": 80, "dropout": 0.1}
    defaults |= {"micro_batch_tokens": 80, "learning_rate": 1e-3, "warmup_steps": 4, "eval_steps": 7}
    cfg = TrainConfig(**{**defaults, "checkpoint_steps": 4, **changes})
    model = tiny_model(num_hidden_layers=2)
    adapter = attach(model, LoRAConfig(r=cfg.r, dropout=cfg.dropout), "a", seed=1)
    return train(model, adapter, rows(70, 0), rows(6, 1), cfg, out, 5, "tiny")


def kill_until_done(out: Path, seed: int, whole_s: float) -> int:
    """Start the training in children that live for a random part of `whole_s` each; the number of kills it took.

    Called in a process that has not computed anything yet: a fork after OpenMP's threads exist would hang.
    """
    rng, kills = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            run(out)
            os._exit(0)
        end = time.monotonic() + rng.uniform(0.02, 0.6) * whole_s + (60 if kills >= 8 else 0)
        while time.monotonic() < end and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert status == 0, "the training failed"
            return kills
        kills += 1


def results(out: Path) -> dict[str, bytes]:
    names = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "train_log.jsonl")
    summary = {k: v for k, v in json.loads((out / "train_summary.json").read_text()).items() if k not in TIMES}
    return {name: (out / name).read_bytes() for name in names} | {"summary": json.dumps(summary).encode()}


def test_killed_and_resumed_is_byte_identical(tmp_path: Path) -> None:
    started = time.monotonic()
    summary = run(tmp_path / "whole")
    whole_s = time.monotonic() - started
    assert summary.num_steps == STEPS
    assert len((tmp_path / "whole/train_log.jsonl").read_bytes().splitlines()) == STEPS
    out = tmp_path / "killed"
    call = f"print(t.kill_until_done(p.Path({str(out)!r}), 0, {whole_s}))"
    code = f"import tests.train.test_resume as t, pathlib as p; {call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) >= 3, "it was hardly ever killed"
    assert results(out) == results(tmp_path / "whole")
    left = sorted(path.name for path in out.iterdir() if not path.name.endswith(".tmp"))
    assert left == ["adapter", "train_log.jsonl", "train_summary.json"]


def test_what_a_kill_after_the_seal_leaves_is_removed(tmp_path: Path) -> None:
    summary = run(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"the last one")
    assert run(tmp_path) == summary
    assert not (tmp_path / "checkpoint.safetensors").exists()


def stop_after(out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that ends with an exception in the middle of the step after `step`."""
    from isheep.train.trainer import Trainer

    real = Trainer.step

    def failing(self: Trainer, each: Any) -> dict[str, Any]:
        if each.number > step:
            raise KeyboardInterrupt
        return real(self, each)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", failing)
        run(out)


def test_other_settings_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(tmp_path, 2, monkeypatch)  # before the first regular checkpoint
    for changes, name in (({"learning_rate": 2e-3}, "train.learning_rate"), ({"r": 4}, "train.r")):
        with pytest.raises(UserError, match=f"checkpoint.safetensors was made with other .*{name}"):
            run(tmp_path, **changes)
    run(tmp_path, checkpoint_steps=9, gradient_checkpointing=False)  # these two change no result
    with pytest.raises(UserError, match=r"train_summary.json was made with other train.epochs:"):
        run(tmp_path, epochs=4.0)


def test_a_finished_training_is_read_back(tmp_path: Path) -> None:
    first = run(tmp_path, epochs=0.3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(tmp_path, epochs=0.3) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_gradient_checkpointing_changes_no_byte(tmp_path: Path) -> None:
    logs = []
    for on in (True, False):
        run(tmp_path / str(on), epochs=0.5, gradient_checkpointing=on)
        logs.append((tmp_path / str(on) / "train_log.jsonl").read_bytes())
    assert logs[0] == logs[1]


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(tmp_path, 9, monkeypatch)
    (tmp_path / "train_log.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train_log.jsonl is shorter"):
        run(tmp_path)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint.safetensors is damaged"):
        run(tmp_path)
    checkpoint.unlink()
    assert run(tmp_path).num_steps == STEPS


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use"):
        run(tmp_path / "file" / "out")
