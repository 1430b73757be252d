"""What rings and what does not, on data sets made to go wrong in one way each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isheep.alarms import Alarms, data_alarms, health, is_out_of_patience, loss_alarms
from isheep.config import AlarmConfig, UserError
from isheep.log import Events
from isheep.stages import Iteration
from isheep.text.templates import template

CFG = AlarmConfig(min_survivors=10)


def rows(num: int = 20, words: int = 40, score: int | None = None, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"Explain the {i}th thing.",
            "input": "some" if i % 2 else "",
            "output": " ".join(f"w{i}_{j}" for j in range(words)),
            "quality_score": 9 + i % 2 if score is None else score,
        }
        for i in range(start, start + num)
    ]


def test_a_sound_data_set_rings_nothing() -> None:
    now = health(rows(start=100), [rows()])
    assert data_alarms(now, health(rows()), CFG) == []
    assert (now.survivors, now.with_input, now.median_words, now.duplicates) == (20, 0.5, 40, 0)
    assert (now.distinct_2, now.full_marks) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (rows(num=9, start=100), "only 9 rows"),
        (rows(words=19, start=100), "shrunk to a median of 19 words from 40"),
        ([*rows(num=19, start=100), rows()[0]], "1 of 20 instructions repeat"),
        ([*rows(num=19, start=100), rows(start=100)[3]], "1 of 20 instructions repeat"),
        (rows(score=10, start=100), "100% of the quality scores are 10"),
    ],
)
def test_each_fault_rings_its_own_alarm(data: list[dict[str, Any]], word: str) -> None:
    (alarm,) = data_alarms(health(data, [rows()]), health(rows()), CFG)
    assert word in alarm and "(alarm." in alarm


def test_an_instruction_is_the_same_whatever_its_case_and_blanks() -> None:
    copy = {**rows()[0], "instruction": "  explain THE 0th\nthing."}
    assert health([copy], [rows()]).duplicates == 1
    assert health([{**copy, "input": "other"}], [rows()]).duplicates == 0


def test_repeated_word_pairs_and_unrated_rows_are_counted() -> None:
    data = [{**row, "output": "yes it is", "quality_score": None} for row in rows()]
    found = health(data)
    assert found.distinct_2 == 2 / 40 and found.full_marks is None
    assert data_alarms(found, found, CFG) == []


def test_a_loss_that_goes_up_rings() -> None:
    falling, rising = [{"loss": x} for x in (3.0, 2.0, 2.9)], [{"loss": x} for x in (3.0, 2.0, 3.1)]
    assert loss_alarms(falling, CFG) == []
    assert len(loss_alarms(rising, CFG)) == 1
    validated = [{"loss": 9.0, "val_loss": 2.0}, {"loss": 1.0}, {"loss": 99.0, "val_loss": 2.1}]
    assert loss_alarms(validated, CFG) == [], "validation losses count where there are any"


def iteration(out: Path, number: int, data: list[dict[str, Any]]) -> Iteration:
    folder = out / f"iter{number}"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(data))
    return Iteration(number, folder, 0, "m", "float32", 512, template("raw"))


def test_an_alarm_warns_and_is_an_event_or_stops_the_run(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    first, second = iteration(tmp_path, 1, rows()), iteration(tmp_path, 2, rows(words=5, start=100))
    alarms = Alarms(tmp_path, CFG, events)
    alarms.look_at_data(first)
    alarms.look_at_data(second)
    written = [json.loads(line) for line in events.path.read_text().splitlines()]
    assert [row["event"] for row in written] == ["health", "health", "alarm"]
    assert written[1]["median_words"] == 5 and written[2]["iteration"] == 2
    with pytest.raises(UserError, match=r'iter2: outputs have shrunk .*alarm\.on_alarm = "warn"'):
        Alarms(tmp_path, replace(CFG, on_alarm="stop"), events).look_at_data(second)


def test_patience(tmp_path: Path) -> None:
    losses = (2.0, 1.5, 1.6, 1.5, 1.4)
    for t, loss in enumerate(losses, 1):
        (tmp_path / f"iter{t}").mkdir()
        (tmp_path / f"iter{t}/train_summary.json").write_text(json.dumps({"best_val_loss": loss}))
    assert [is_out_of_patience(tmp_path, t, 2) for t in range(1, 6)] == [False, False, False, True, False]
    assert [is_out_of_patience(tmp_path, t, 1) for t in range(1, 6)] == [False, False, True, True, False]
    assert not any(is_out_of_patience(tmp_path, t, None) for t in range(1, 6))
