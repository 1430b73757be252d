"""`python -m isheep.train` from a checkpoint folder and a JSON file to an adapter."""

import json
import sys
from pathlib import Path

import pytest

from isheep.config import UserError
from isheep.train import __main__ as command
from tests.tiny import tiny_model, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_model(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(10)]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps([*rows, {"instruction": "Say nothing."}, 7]))
    return path


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, dataset: Path, out: Path, *more: str) -> None:
    args = ["--model", str(folder), "--data", str(dataset), "--out", str(out), "--dtype", "float32", *more]
    monkeypatch.setattr(sys, "argv", ["train", *args])
    command.main()


def test_train_then_go_on_from_the_adapter(
    monkeypatch: pytest.MonkeyPatch, folder: Path, dataset: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("model = 'other'\n[train]\nr = 4\nbatch_size = 4\nwarmup_steps = 0\n")
    flags = ("--config", str(config), "--set", "epochs=1", "--set", "train.learning_rate=1e-3")
    call(monkeypatch, folder, dataset, tmp_path / "first", *flags)
    log = [json.loads(line) for line in (tmp_path / "first/train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3]
    assert log[0]["learning_rate"] == 1e-3
    assert "val_loss" in log[-1]
    summary = json.loads((tmp_path / "first/train_summary.json").read_text())
    assert (summary["num_rows"], summary["num_val_rows"]) == (9, 1)
    adapter = tmp_path / "first" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4

    call(monkeypatch, folder, dataset, tmp_path / "second", "--adapter", f"start={adapter}", *flags)
    again = [json.loads(line) for line in (tmp_path / "second/train_log.jsonl").read_text().splitlines()]
    assert again[0]["loss"] < log[0]["loss"]


def test_mistakes(monkeypatch: pytest.MonkeyPatch, folder: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.lerning_rate.*train\.learning_rate"):
        call(monkeypatch, folder, dataset, tmp_path / "out", "--set", "lerning_rate=1")
    with pytest.raises(UserError, match="one adapter at most"):
        call(monkeypatch, folder, dataset, tmp_path / "out", "--adapter", "a=x", "--adapter", "b=y")
    dataset.write_text("[]")
    with pytest.raises(UserError, match="no usable row"):
        call(monkeypatch, folder, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
