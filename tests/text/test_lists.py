"""A numbered list is read as it was meant, and no further than its numbers go on."""

import pytest

from isheep.text.lists import numbered, parse_numbered


def test_layout() -> None:
    assert numbered(["Sort  the\nwords.", "Why?"]) == "1. Sort the words.\n2. Why?\n"
    assert numbered([]) == ""


@pytest.mark.parametrize(
    ("text", "is_cut", "found"),
    [
        (" Name a tree.\n10. Why\n  so?\n11 . Go.", False, (["Name a tree.", "Why so?", "Go."], 0)),
        (" Name a tree.\n10. Why so", True, (["Name a tree."], 0)),
        (" Name a tr", True, ([], 0)),
        (" In 2010. Sum\n9. of them\n10. Next", False, (["In 2010. Sum 9. of them", "Next"], 0)),
        (" First\n11. a number is left out", False, (["First 11. a number is left out"], 0)),
        (" First\n10.\n11. Third", False, (["First", "Third"], 1)),
        (" First\n\nThat was the list.\n10. Second", False, (["First", "Second"], 0)),
        ("", False, ([], 1)),
    ],
)
def test_items(text: str, is_cut: bool, found: tuple) -> None:
    assert parse_numbered(text, 9, is_cut) == found
