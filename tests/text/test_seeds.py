"""Reading seed files: what is kept, skipped and refused."""

import json
from pathlib import Path

import pytest

from isheep.config import UserError
from isheep.text.seeds import SeedTask, load_seeds

GOOD = {
    "id": "seed_task_0",
    "name": "opposites",
    "instruction": "Name the opposite.",
    "instances": [{"input": "hot", "output": "cold"}],
    "is_classification": False,
}
BAD = [
    {},
    {**GOOD, "instruction": "  "},
    {**GOOD, "id": 7},
    {**GOOD, "instances": []},
    {**GOOD, "instances": ["hot"]},
    {**GOOD, "instances": [{"input": "hot"}]},
    {**GOOD, "is_classification": "no"},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_malformed_rows_are_skipped_and_counted(tmp_path):
    tasks, skipped = load_seeds(write(tmp_path / "seeds.jsonl", [*BAD, GOOD, "a text"]))
    assert tasks == [SeedTask("seed_task_0", "Name the opposite.", "hot", "cold", False)]
    assert skipped == len(BAD) + 1


def test_a_file_without_any_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of the 7 rows"):
        load_seeds(write(tmp_path / "seeds.jsonl", BAD))


@pytest.mark.skipif(not (Path(__file__).parents[2] / "../shared/data").is_dir(), reason="needs the shared data")
def test_the_public_set():
    tasks, skipped = load_seeds(Path(__file__).parents[2] / "../shared/data/self_instruct/seed_tasks.jsonl")
    assert (len(tasks), skipped) == (175, 0)
    assert sum(task.is_classification for task in tasks) == 26
    assert sum(task.input != "" for task in tasks) == 125
