"""The log goes to stderr, events to their file, and progress is told without a terminal."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from isheep import log
from isheep.config import UserError


@pytest.fixture(autouse=True)
def clean_logger() -> Iterator[None]:
    before, propagate, level = log.log.handlers[:], log.log.propagate, log.log.level
    log.log.handlers.clear()
    yield
    log.log.handlers[:], log.log.propagate = before, propagate
    log.log.setLevel(level)


def test_setup_twice_logs_once_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.setup()
    log.log.info("hello")
    log.log.debug("unseen")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("hello") == 1
    assert "unseen" not in err
    log.setup(verbose=True)
    assert log.log.level == logging.DEBUG


def test_events_append_across_runs(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log.Events(path).write("start", seed=1)
    log.Events(path).write("stage", name="answer\u2028", rows=3)
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [row["event"] for row in rows] == ["start", "stage"]
    assert rows[1]["name"] == "answer\u2028"
    assert 0 <= rows[1]["time_s"] - rows[0]["time_s"] < 60


def test_events_in_no_folder_are_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        log.Events(tmp_path / "absent" / "events.jsonl").write("start")


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log.setup()
    monkeypatch.setattr(log, "PERIOD_S", 1e9)
    with log.Progress("answer", total=5) as bar:
        for _ in range(4):
            bar.update(decode="7 tok/s")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(log, "PERIOD_S", 0.0)
        bar.update()
        assert "answer: 5/5 rows" in capsys.readouterr().err
    last = capsys.readouterr().err
    assert "answer: 5/5 rows" in last
    assert "decode 7 tok/s" in last
