"""Rules that a generated instruction, and later its answer, must pass: a table of named reasons each, in order.

The rules are the paper's (arXiv 2408.08072, its appendix on filters); those for instances are Self-Instruct's. The
first reason that holds drops the row. Words are matched whole and in any case. Each table is read from top to bottom.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from isheep.config import InstructConfig

Row = Mapping[str, str]  # {instruction, input} and, once it is answered, {output}


def instruction_reason(row: Row, cfg: InstructConfig) -> str | None:
    """Why `row` {instruction, input} is dropped before it is answered; None if it is kept. ROUGE-L comes after this."""
    return next((reason for reason, holds in INSTRUCTION_RULES if holds(row, cfg)), None)


def pair_reason(row: Row, option_letter_rule: str = "fixed") -> str | None:
    """Why `row` {instruction, input, output} is dropped before it is assessed; None if it is kept.

    `option_letter_rule`: "as_run" also takes the "e." of "e.g." and "i.e." for an option letter, as the paper's runs
    did; "fixed" does not.
    """
    return next((reason for reason, holds in PAIR_RULES if holds(row, option_letter_rule)), None)


def instance_reason(instance: Row, siblings: Sequence[Row] = ()) -> str | None:
    """Why Self-Instruct drops {input, output}, one of the instances of an instruction; None if it is kept."""
    return next((reason for reason, holds in INSTANCE_RULES if holds(instance, siblings)), None)


def _either(pattern: str) -> Callable[[Row, object], bool]:
    """The pattern is found in the instruction or in the input."""
    find = re.compile(pattern, re.IGNORECASE).search
    return lambda row, _: bool(find(row["instruction"]) or find(row["input"]))


def _output(pattern: str) -> Callable[[Row, object], bool]:
    """The pattern is found in the output; ^ and $ are the ends of a line."""
    find = re.compile(pattern, re.IGNORECASE | re.MULTILINE).search
    return lambda row, _: bool(find(row["output"]))


@lru_cache
def _any_word(words: tuple[str, ...]) -> re.Pattern[str]:
    """Finds any of `words` whole; a space stands for any white space."""
    spelled = (r"\s+".join(map(re.escape, word.split())) for word in words)
    return re.compile(rf"\b(?:{'|'.join(spelled)})\b", re.IGNORECASE)


def _blacklisted(row: Row, cfg: InstructConfig) -> bool:
    if not cfg.blacklist:
        return False
    find = _any_word(cfg.blacklist).search
    return bool(find(row["instruction"]) or find(row["input"]))


def _bad_start(row: Row, cfg: InstructConfig) -> bool:
    first = row["instruction"].lstrip()[:1]
    return first in string.punctuation or not first.isascii()


def _refused_start(row: Row, cfg: InstructConfig) -> bool:
    return row["instruction"].lower().startswith(tuple(start.lower() for start in cfg.refused_starts))


def _follow_up_question(row: Row, _: object) -> bool:
    """A blank line, then a short line with a question mark: the model went on to the user's next turn."""
    lines = [line.strip() for line in row["output"].split("\n")]
    return any(not before and "?" in line and len(line) <= 100 for before, line in pairwise(lines))


_OPTION_LETTER = {
    "as_run": re.compile(r"\b[A-E]\.|\([A-E]\)", re.IGNORECASE),
    "fixed": re.compile(r"(?<![\w.])[A-E]\.(?!\w)|\([A-E]\)", re.IGNORECASE),
}


def _option_letter(row: Row, option_letter_rule: str) -> bool:
    return bool(_OPTION_LETTER[option_letter_rule].search(row["output"]))


def _input_repeated(row: Row, _: object) -> bool:
    input = row["input"].strip()
    return bool(input) and input in row["instruction"]


def _contradicted(instance: Row, siblings: Sequence[Row]) -> bool:
    """A sibling has the same input, but another output: neither can be trusted."""
    same = [other for other in siblings if instance["input"] and other["input"] == instance["input"]]
    return any(other["output"] != instance["output"] for other in same)


_NO_INPUT = r"\bno ?input\b"
# Han: the unified block, extension A, the compatibility block, and the planes of the later extensions.
_CJK = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"

INSTRUCTION_RULES: tuple[tuple[str, Callable[[Row, InstructConfig], bool]], ...] = (
    ("too_short", lambda row, cfg: len(row["instruction"].split()) < cfg.min_words),
    ("too_long", lambda row, cfg: len(row["instruction"].split()) > cfg.max_words),
    ("blacklist", _blacklisted),
    ("bad_start", _bad_start),
    ("refused_start", _refused_start),
    ("no_input_marker", _either(_NO_INPUT)),
    ("field_label", _either(r"\b(?:instruction|input|output)\s*:")),
    ("url", _either(r"\b(?:https?|ftp)://|\bwww\.")),
)

PAIR_RULES: tuple[tuple[str, Callable[[Row, str], bool]], ...] = (
    ("empty_output", lambda row, _: not row["output"].strip()),
    ("role_label", _output(r"^[ \t]*(?:assistant|system|human|user|question|output)[ \t]*(?::|$)")),
    ("answer_choices", _output(r"\banswer choices[ \t]*(?::|$)")),
    ("no_input_marker", _output(_NO_INPUT)),
    ("asks_back", _output(r"^[ \t]*(?:can|do) you\b")),
    ("follow_up_question", _follow_up_question),
    ("option_letter", _option_letter),
    ("cjk", _output(_CJK)),
    ("no_input_marker", _either(_NO_INPUT)),
    ("angle_brackets", _either(r"<[^<>]{1,20}>")),
    ("none_text", _either("none")),  # a bare substring, as the paper's runs had it: "nonetheless" is hit too
    ("input_repeated", _input_repeated),
)

INSTANCE_RULES: tuple[tuple[str, Callable[[Row, Sequence[Row]], bool]], ...] = (
    ("empty_output", lambda row, _: not row["output"]),
    ("input_is_output", lambda row, _: row["input"] == row["output"]),
    ("ends_with_colon", lambda row, _: row["input"].endswith(":") or row["output"].endswith(":")),
    ("duplicate_input", _contradicted),
)
