"""Each rule with a text that it drops and the nearest one that it keeps."""

import json
from collections import Counter
from pathlib import Path

import pytest

from isheep.config import InstructConfig
from isheep.filter.rules import (
    INSTANCE_RULES,
    INSTRUCTION_RULES,
    PAIR_RULES,
    instance_reason,
    instruction_reason,
    pair_reason,
)

CFG = InstructConfig()
GOOD = "Explain why the sky looks blue."

INSTRUCTIONS = [
    (GOOD, "", None),
    ("Name three colours", "", "too_short"),
    ("Name four bright colours", "", None),
    ("word " * 150, "", None),
    ("word " * 151, "", "too_long"),
    ("Describe this IMAGE in words.", "", "blacklist"),
    ("Describe what you imagine here.", "", None),  # "image" is not a whole word here
    (GOOD, "See the attached files.", "blacklist"),
    (GOOD, "Go\nto the shop.", "blacklist"),
    (GOOD, "It was time to go home.", None),
    ("Explain a profile and a mapping.", "", None),
    ("* Explain why it rains.", "", "bad_start"),
    (" 'Explain why it rains'", "", "bad_start"),
    ("Éxplain why it rains.", "", "bad_start"),
    ("3 reasons why it rains?", "", None),
    ("Explain how a café works.", "", None),
    (GOOD, "No input", "no_input_marker"),
    ("Explain this, <noinput> and more.", "", "no_input_marker"),
    ("Explain this, the casino inputs more.", "", None),
    ("Translate this. Input: hello", "", "field_label"),
    (GOOD, "7. Instruction: go on", "field_label"),
    (GOOD, "The output of the pump is low.", None),
    (GOOD, "see https://example.org", "url"),
    ("Sum up www.example.org in brief.", "", "url"),
    (GOOD, "the word http alone", None),
]


REFUSED = [
    ("Write a program that sorts words.", "refused_start"),
    ("write a PROGRAM now, please.", "refused_start"),
    ("Write a programme for the concert.", "refused_start"),  # the start of the text, not a word
    ("Please write a program for me.", None),
]

INSTANCES = [
    ("a cat", "animal", None),
    ("", "animal", None),
    ("a cat", "", "empty_output"),
    ("animal", "animal", "input_is_output"),
    ("a list:", "animal", "ends_with_colon"),
    ("a cat", "It is an:", "ends_with_colon"),
    ("a dog", "an animal", "duplicate_input"),
    ("a dog", "animal", None),  # the very same as the sibling
]
SIBLINGS = [{"input": "a dog", "output": "animal"}, {"input": "", "output": "plant"}]


@pytest.mark.parametrize(("instruction", "reason"), REFUSED)
def test_refused_starts(instruction, reason):
    row = {"instruction": instruction, "input": ""}
    assert instruction_reason(row, InstructConfig(refused_starts=("Write a program",))) == reason
    assert instruction_reason(row, CFG) is None


@pytest.mark.parametrize(("input", "output", "reason"), INSTANCES)
def test_instance_rules(input, output, reason):
    assert instance_reason({"input": input, "output": output}, SIBLINGS) == reason


@pytest.mark.parametrize(("instruction", "input", "reason"), INSTRUCTIONS)
def test_instruction_rules(instruction, input, reason):
    assert instruction_reason({"instruction": instruction, "input": input}, CFG) == reason


@pytest.mark.parametrize("word", CFG.blacklist)
def test_every_blacklisted_word(word):
    assert len(CFG.blacklist) == 18
    assert instruction_reason({"instruction": f"Please {word.upper()}, then stop.", "input": ""}, CFG) == "blacklist"


def test_limits_and_words_come_from_the_settings():
    cfg = InstructConfig(min_words=2, max_words=3, blacklist=("teapot",))
    reasons = [instruction_reason({"instruction": text, "input": ""}, cfg) for text in ("a", "a b c d", "a teapot")]
    assert reasons == ["too_short", "too_long", "blacklist"]
    assert instruction_reason({"instruction": "draw a map", "input": ""}, cfg) is None
    assert (
        instruction_reason({"instruction": "a teapot", "input": ""}, InstructConfig(min_words=1, blacklist=())) is None
    )


OUTPUTS = [
    ("Because of scattering.", None),
    (" \n", "empty_output"),
    ("Well.\n  Human: and then?", "role_label"),
    ("Fine.\nAssistant", "role_label"),
    ("Question :\nwhy", "role_label"),
    ("The user: a person.\nUsers: many\nA question for later.", None),
    ("Answer Choices:\n1) yes", "answer_choices"),
    ("Weigh the answer choices with care.", None),
    ("There is no input here.", "no_input_marker"),
    ("Sure.\nCan you say more", "asks_back"),
    ("do you like it", "asks_back"),
    ("I can, you see. Doing your work.", None),
    ("Yes.\n\nWhat is the sea?", "follow_up_question"),
    ("Yes.\n \n" + "x" * 99 + "?", "follow_up_question"),
    ("Yes.\n\n" + "x" * 100 + "?", None),
    ("Yes.\nWhat is the sea?\n\nIt is water.", None),
    ("The answer is B.", "option_letter"),
    ("It is (c) of course", "option_letter"),
    ("Plan F. Vitamin (K). ABC. A, B", None),
    ("天气很好", "cjk"),
    ("ひらがな", None),
]


@pytest.mark.parametrize(("output", "reason"), OUTPUTS)
def test_rules_on_the_output(output, reason):
    assert pair_reason({"instruction": GOOD, "input": "", "output": output}) == reason


@pytest.mark.parametrize(
    "output", ["Fruit, e.g. apples", "That is, i.e. soon", "E.g., this", "in Washington D.C. today"]
)
def test_abbreviations_are_option_letters_only_as_run(output):
    row = {"instruction": GOOD, "input": "", "output": output}
    assert pair_reason(row) is None
    assert pair_reason(row, "as_run") == "option_letter"


@pytest.mark.parametrize(
    ("instruction", "input", "reason"),
    [
        (GOOD, "noinput", "no_input_marker"),
        (GOOD, "Dear <your name>", "angle_brackets"),
        (GOOD, "<" + "x" * 21 + ">", None),
        (GOOD, "1 < 2 but 3 <> 4", None),
        (GOOD, "None", "none_text"),
        ("Explain it nonetheless, please.", "", "none_text"),
        (GOOD, " the sky ", "input_repeated"),
        (GOOD, "the sea", None),
    ],
)
def test_rules_on_instruction_and_input(instruction, input, reason):
    assert pair_reason({"instruction": instruction, "input": input, "output": "Yes."}) == reason


def test_every_rule_has_a_text_above():
    assert {reason for reason, _ in INSTRUCTION_RULES} == {row[-1] for row in [*INSTRUCTIONS, *REFUSED]} - {None}
    assert {reason for reason, _ in INSTANCE_RULES} == {reason for *_, reason in INSTANCES} - {None}
    on_pair = {"no_input_marker", "angle_brackets", "none_text", "input_repeated"}
    assert {reason for reason, _ in PAIR_RULES} == ({reason for _, reason in OUTPUTS} | on_pair) - {None}


@pytest.mark.skipif(not (Path(__file__).parents[2] / "../shared/data").is_dir(), reason="needs the shared data")
def test_most_of_the_public_seeds_pass():
    file = Path(__file__).parents[2] / "../shared/data/self_instruct/seed_tasks.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    pairs = [{"instruction": row["instruction"], **row["instances"][0]} for row in rows]
    counts = Counter(instruction_reason(pair, CFG) or pair_reason(pair) for pair in pairs)
    assert counts[None] > 120, counts
