"""Numbered lists: how one is shown to a model, and how what it goes on with is read."""

import re
from collections.abc import Sequence


def numbered(items: Sequence[str]) -> str:
    """A line "N. item" for each, from 1."""
    return "".join(f"{n}. {' '.join(item.split())}\n" for n, item in enumerate(items, 1))


def parse_numbered(text: str, first: int, is_cut: bool) -> tuple[list[str], int]:
    """The items of a list that goes on after "first.", each on one line, and how many were empty.

    An item ends at a blank line, or where a line begins with the next number. The last one of a text that `is_cut` is
    discarded, and not counted.
    """
    items, number = [], first
    while found := re.search(rf"\n\s*{number + 1}\s*\.", text):
        items.append(text[: found.start()])
        text, number = text[found.end() :], number + 1
    items += [] if is_cut else [text]
    lines = [" ".join(item.strip().partition("\n\n")[0].split()) for item in items]
    kept = [line for line in lines if line]
    return kept, len(lines) - len(kept)
