"""The layout of Self-Instruct's prompts, and how their completions are read."""

import pytest

from isheep.text.seeds import SeedTask
from isheep.text.self_instruct import (
    classification_prompt,
    instance_prompt,
    parse_classification,
    parse_instances,
    task_list_prompt,
)

EXAMPLES = [
    SeedTask("a", "Is it a\nplant?", "oak", "yes", True),
    SeedTask("b", "Why is the sea salty?", " ", "Rivers bring salt.", False),
]


def test_task_list() -> None:
    assert task_list_prompt(["Sort.", "Why?"]).endswith(":\n1. Sort.\n2. Why?\n3.")


def test_classification() -> None:
    prompt = classification_prompt("Do\nit.", EXAMPLES)
    assert prompt.endswith(
        "\n\nTask: Is it a plant?\nClassification: yes\n\nTask: Why is the sea salty?\nClassification: no\n\n"
        "Task: Do it.\nClassification:"
    )
    assert [parse_classification(text) for text in (" Yes", "yes.", " no", "", "not yes")] == [True, True] + [False] * 3


def test_the_order_of_the_fields_is_that_of_the_kind() -> None:
    first, second = (instance_prompt("Do it.", EXAMPLES, output_first) for output_first in (False, True))
    assert "Task: Is it a\nplant?\nInput: oak\nOutput: yes\n\n" in first and first.endswith("Task: Do it.\nInput:")
    assert "Input: <noinput>\nOutput: Rivers bring salt.\n\n" in first
    assert "Task: Is it a\nplant?\nOutput: yes\nInput: oak\n\n" in second and second.endswith("Task: Do it.\nOutput:")


@pytest.mark.parametrize(
    ("text", "is_cut", "found"),
    [
        (" oak\nOutput: yes\n", False, [("oak", "yes")]),
        (" <noinput>\nOutput: yes", False, [("", "yes")]),
        (" a\n b\nOutput: c\n\nd\nInput: e\nOutput: f", False, [("a\n b", "c\n\nd"), ("e", "f")]),
        (" a\nOutput: b\nInput: c\nOutput: d", True, [("a", "b")]),
        (" a\nOutput: b", True, []),
        (" a\nOutput: b\nInput: c", False, [("a", "b")]),
        (" a\nInput: b\nOutput: c", False, []),
        (" the Output: of it", False, []),
        ("", False, []),
    ],
)
def test_instances(text: str, is_cut: bool, found: list) -> None:
    rows = [{"input": input, "output": output} for input, output in found]
    assert parse_instances(text, False, is_cut) == rows


def test_instances_with_the_output_first() -> None:
    text = " yes\nInput: oak\nOutput: no\nInput: <noinput>\nOutput: mayb"
    rows = [{"input": "oak", "output": "yes"}, {"input": "", "output": "no"}]
    assert parse_instances(text, True, is_cut=True) == rows == parse_instances(text, True, is_cut=False)
    assert parse_instances(" oak\nOutput: yes", True, is_cut=False) == [], "the fields are in the other order"
