"""The rules are the sixteen, the exemplars show how to use them, and a reply needs both of its parts."""

import re

import pytest

from isheep.text.principles import EXEMPLARS, RULES, SHARED_TEXT, parse_reply, principle_prompt

LABELS = (
    "ethical, informative, helpful, question assessment, reasoning, multi-aspect, candor, knowledge recitation, "
    "static, clarification, numerical sensitivity, dated knowledge, step-by-step, balanced perspectives, creative, "
    "operational"
)


def test_the_rules_are_the_sixteen_in_their_order() -> None:
    assert list(RULES) == LABELS.split(", ")
    places = [SHARED_TEXT.index(f"{n} ({label}). ") for n, label in enumerate(RULES, 1)]
    assert places == sorted(places)


def test_each_exemplar_names_rules_by_number_and_label() -> None:
    assert len(EXEMPLARS) == 5
    for exemplar in EXEMPLARS:
        named = re.findall(r"rule (\d+), ([a-z -]+)\)", exemplar.thoughts)
        assert len(named) == exemplar.thoughts.count("rule ") >= 2
        assert all(list(RULES)[int(n) - 1] == label for n, label in named)


def test_an_exemplar_reads_as_the_reply_it_is() -> None:
    for exemplar in EXEMPLARS:
        question, *rest = SHARED_TEXT.partition(f"Question: {exemplar.question}\n")[1:]
        assert question and parse_reply(rest[0]) == (exemplar.thoughts, exemplar.answer)


def test_the_prompt_is_the_shared_text_and_the_question() -> None:
    assert principle_prompt("Why?") == f"{SHARED_TEXT}Question: Why?\n"
    assert 1000 <= len(SHARED_TEXT.split()) <= 1400  # about 1.8k tokens


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Thoughts: rule 2.\nAnswer: Because.", ("rule 2.", "Because.")),
        (" Thoughts: a\nb Answer: c\n\nd\n", ("a\nb", "c\n\nd")),
        ("Thoughts: a\nAnswer: b\nQuestion: c\nThoughts: d\nAnswer: e", ("a", "b")),
        ("Thoughts: a\nAnswer:", ("a", "")),
        ("Thoughts: a, and no more", None),
        ("Answer: b", None),
        ("Answer: b\nThoughts: a", None),
        ("Well. Thoughts: a\nAnswer: b", None),
        ("Thoughts: a\nQuestion: c\nAnswer: b", None),
        ("", None),
    ],
)
def test_a_reply_needs_both_of_its_parts(text: str, found: tuple[str, str] | None) -> None:
    assert parse_reply(text) == found
