"""The bundled seed tasks: the field's public schema and counts, the project's own filter rules, and variety."""

import json
from pathlib import Path

import pytest

from isheep.config import InstructConfig, data_path
from isheep.filter.rouge import RougePool
from isheep.filter.rules import instruction_reason

PUBLIC = Path(__file__).parents[2] / "../shared/data/self_instruct/seed_tasks.jsonl"


def read_tasks(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def pool_of(tasks: list[dict]) -> RougePool:
    pool = RougePool()
    for task in tasks:
        pool.add(task["instruction"])
    return pool


@pytest.fixture(scope="module")
def tasks() -> list[dict]:
    return read_tasks(data_path("seeds", "seed_tasks.jsonl"))


def test_every_task_has_the_public_schema(tasks: list[dict]) -> None:
    for task in tasks:
        assert list(task) == ["id", "name", "instruction", "instances", "is_classification"]
        assert [list(instance) for instance in task["instances"]] == [["input", "output"]]
        assert isinstance(task["is_classification"], bool)
        fields = [task["name"], task["instruction"], *task["instances"][0].values()]
        assert all(isinstance(field, str) and field == field.strip() for field in fields), task["id"]


def test_counts_match_the_public_set(tasks: list[dict]) -> None:
    assert len(tasks) == 175
    assert sum(task["is_classification"] for task in tasks) == 26
    assert sum(task["instances"][0]["input"] != "" for task in tasks) == 125


def test_ids_names_and_instructions_are_unique(tasks: list[dict]) -> None:
    assert [task["id"] for task in tasks] == [f"seed_task_{i}" for i in range(len(tasks))]
    for field in ("name", "instruction"):
        assert len({task[field] for task in tasks}) == len(tasks)


def test_every_output_answers(tasks: list[dict]) -> None:
    for task in tasks:
        (instance,) = task["instances"]
        assert instance["output"] and instance["output"] != instance["input"], task["id"]
        assert not instance["output"].endswith(":"), task["id"]


def test_no_task_breaks_the_prompt_format(tasks: list[dict]) -> None:
    """`###` separates the items, and generation stops at the text "17": a completion that echoes it would be cut."""
    for task in tasks:
        shown = task["instruction"] + task["instances"][0]["input"]
        assert "###" not in shown and "17" not in shown, task["id"]
        assert "\n" not in task["instruction"] and not task["instruction"].endswith(":"), task["id"]


def test_every_task_passes_the_instruction_filter(tasks: list[dict]) -> None:
    rows = {task["id"]: {"instruction": task["instruction"], "input": task["instances"][0]["input"]} for task in tasks}
    reasons = {id: instruction_reason(row, InstructConfig()) for id, row in rows.items()}
    assert {id: reason for id, reason in reasons.items() if reason is not None} == {}


def test_instructions_begin_in_many_ways(tasks: list[dict]) -> None:
    first_words = {task["instruction"].split()[0].lower() for task in tasks}
    assert len(first_words) >= 100


def test_no_two_instructions_are_alike(tasks: list[dict]) -> None:
    pool = pool_of(tasks)
    for i, task in enumerate(tasks):
        similarities = pool.similarities(task["instruction"])
        assert similarities[i] == pytest.approx(1.0)
        similarities[i] = 0.0
        assert similarities.max() < 0.7, task["id"]


@pytest.mark.skipif(not PUBLIC.is_file(), reason="the public seed tasks are not here")
def test_no_instruction_is_like_a_public_one(tasks: list[dict]) -> None:
    pool = pool_of(read_tasks(PUBLIC))
    for task in tasks:
        assert pool.similarities(task["instruction"]).max() < 0.7, task["id"]
