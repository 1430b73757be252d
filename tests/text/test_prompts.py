"""The prompts' layout, and how completions and ratings are read."""

import re
from itertools import takewhile
from pathlib import Path

import pytest

from isheep.config import ASSESS_LEVELS, ASSESS_PROMPTS
from isheep.text.prompts import (
    ASSESSMENTS,
    QUESTIONS,
    assess_prompt,
    instruction_prompt,
    parse_instructions,
    parse_score,
    questions,
)
from isheep.text.seeds import SeedTask
from tests.scripted import tiny_tokenizer

EXAMPLES = [
    SeedTask("a", "Sort  the\nwords: ", "pear apple", "apple pear", False),
    SeedTask("b", "Why is the sea salty?", " ", "Rivers bring salt.", False),
]
ROW = {"instruction": "Add.", "input": "1 {x}", "output": "2 {y}"}
ASKED = [(variant, question) for variant, assessment in ASSESSMENTS.items() for question in assessment.criteria]


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


@pytest.mark.parametrize(("variant", "question"), ASKED)
def test_layout_of_the_assessments(variant, question):
    text = assess_prompt(ROW, question, variant)
    item = text[text.rindex("Below are") :]  # behind the examples, where there are any
    assert item.index("Add.\n1 {x}\n") < item.index("2 {y}\n") < item.index("from 1 to 10.")
    assert item.index("from 1 to 10.") < item.index("<score>||<explanation>") < item.index("strict rater")
    assert text.endswith("score is:"), "the rater's sentence is the model's to finish"
    assert "Add.\n\n" in assess_prompt({**ROW, "input": ""}, question, variant), "no stray line break without an input"
    criteria = ASSESSMENTS[variant].criteria[question]
    assert f"from 1 to 10.{criteria and ' ' + criteria}\n" in item


def test_the_assessments_ask_different_things_and_cover_the_settings():
    assert len({assess_prompt(ROW, question, variant) for variant, question in ASKED}) == len(ASKED) == 5
    assert tuple(ASSESSMENTS) == ASSESS_PROMPTS
    assert {name for question in QUESTIONS.values() for name in question.scores} == set(ASSESS_LEVELS["both"])


@pytest.mark.parametrize(
    ("variant", "level", "asked"),
    [
        *((variant, "none", []) for variant in ASSESS_PROMPTS),
        *((variant, level, [level]) for variant in ("simple", "combined") for level in ("quality", "following")),
        *((variant, "both", ["quality", "following"]) for variant in ("simple", "combined")),
        ("icl", "both", ["overall"]),
    ],
)
def test_each_level_asks_for_its_scores(variant, level, asked):
    assert questions(variant, ASSESS_LEVELS[level]) == asked


def test_the_examples_look_like_the_item_and_their_scores_can_be_read():
    text = assess_prompt(ROW, "overall", "icl")
    head, *items = text.split("Below are an instruction")
    assert head == "" and len(items) == 4
    replies = [item.partition("score is:")[2] for item in items]
    assert [parse_score(reply) for reply in replies] == [6, 1, 10, None]
    assert all(re.fullmatch(r" \d+\|\|\S.*\n\n\n", reply) for reply in replies[:3]) and replies[3] == ""
    fields = [re.sub(r"(Instruction|Response):\n(.|\n)*?\n\n", "", item.partition("score is:")[0]) for item in items]
    assert len(set(fields)) == 1, "the same words around each"
    assert not any("means" in item for item in items), "no criteria"


def test_what_comes_before_the_question_is_the_same_tokens(tmp_path: Path):
    """The cache is filled once for both questions about a pair, and once for the examples of all pairs."""
    encode = tiny_tokenizer(tmp_path).encode
    for variant in ("simple", "combined"):
        texts = [assess_prompt(ROW, question, variant) for question in ("quality", "following")]
        assert shared_tokens(encode, texts) >= len(encode(texts[0][: texts[0].index("Please rate")])) - 1
    texts = [assess_prompt({**ROW, "instruction": task}, "overall", "icl") for task in ("Add.", "Name a river.")]
    assert shared_tokens(encode, texts) >= len(encode(texts[0][: texts[0].index("Add.")])) - 1


def shared_tokens(encode, texts):
    columns = zip(*(encode(text) for text in texts), strict=False)
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))


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
