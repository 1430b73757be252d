"""The prompts' layout, and how completions and ratings are read."""

import re

import pytest

from isheep.config import ASSESS_PROMPTS
from isheep.text.prompts import (
    ASSESSMENTS,
    following_prompt,
    instruction_prompt,
    parse_instructions,
    parse_score,
    quality_prompt,
)
from isheep.text.seeds import SeedTask

EXAMPLES = [
    SeedTask("a", "Sort  the\nwords: ", "pear apple", "apple pear", False),
    SeedTask("b", "Why is the sea salty?", " ", "Rivers bring salt.", False),
]
ROW = {"instruction": "Add.", "input": "1 {x}", "output": "2 {y}"}


def test_layout_of_the_instruction_prompt():
    prompt = instruction_prompt(EXAMPLES)
    assert prompt.endswith(
        "\n\n###\n1. Instruction: Sort the words\n1. Input:\npear apple\n"
        "###\n2. Instruction: Why is the sea salty?\n2. Input:\n<noinput>\n"
        "###\n3. Instruction:"
    )
    assert "apple pear" not in prompt, "outputs are not shown"
    head = prompt.split("###")[0]
    assert re.findall(r"^(\d+)\. ", head, re.M) == list("123456789")
    assert re.search(r"\b20\b[^.]*\btasks:$", head.strip())


def test_what_the_prompt_shows_parses_back():
    text = instruction_prompt(EXAMPLES).split("1. Instruction:", 1)[1]
    assert parse_instructions(text, first_index=1) == (
        [
            {"instruction": "Sort the words", "input": "pear apple"},
            {"instruction": "Why is the sea salty?", "input": ""},
        ],
        0,
    )


def test_malformed_items_are_counted_and_the_last_is_discarded():
    text = (
        " Name a colour.\n6. Input:\n<NoInput>\n"
        "###\n7. Instruction: No input field here.\n"
        "###\n8. Instruction: Two of them.\n8. Input:\na\n8. Input:\nb\n"
        "###\n10. Instruction: Out of step.\n10. Input:\nx\n"
        "###\n10. Input:\nturned round\n10. Instruction: x\n"
        "###\n11. Instruction:Count to 3.\n11. Input: 1, 2\nand on\n"
        "###\n12. Instruction: Whole, yet last.\n12. Input:\nx\n"
    )
    rows, malformed = parse_instructions(text)
    assert rows == [
        {"instruction": "Name a colour.", "input": ""},
        {"instruction": "Count to 3.", "input": "1, 2\nand on"},
    ]
    assert malformed == 4


@pytest.mark.parametrize("text", ["", " Say hello.\n6. Input:\n<noinput>\n"])
def test_a_lone_item_may_be_cut_and_is_discarded(text):
    assert parse_instructions(text) == ([], 0)


@pytest.mark.parametrize("prompt", [quality_prompt, following_prompt])
def test_layout_of_the_assessments(prompt):
    text = prompt(ROW)
    assert text.index("Add.\n1 {x}\n") < text.index("2 {y}\n") < text.index("from 1 to 10")
    assert text.index("10 means") < text.index("<score>||<explanation>") < text.index("strict rater")
    assert text.endswith("score is:")
    assert "Add.\n\n" in prompt({**ROW, "input": ""}), "no stray line break without an input"


def test_the_assessments_ask_different_things_and_cover_the_settings():
    assert quality_prompt(ROW) != following_prompt(ROW)
    assert tuple(ASSESSMENTS) == ASSESS_PROMPTS


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("9||clear", 9),
        (" **10** || perfect", 10),
        ("\n: 7", 7),
        ("8/10, good", 8),
        ("8.6||nearly", 9),
        ("8.5||a half goes to the even neighbour", 8),
        ("I would say 6 || it rambles", 6),
        ("of 10 points, 4.4||weak", 4),
        ("1", 1),
        ("0||bad", None),
        ("11||too much", None),
        ("10.6||too much", None),
        ("0.4||too little", None),
        ("100 || wrong scale, and 5||later", None),
        ("9" * 400, None),
        ("nine||in words", None),
        ("a 7 without bars", None),
        ("||7", 7),
        ("", None),
    ],
)
def test_scores(text, score):
    assert parse_score(text) == score
