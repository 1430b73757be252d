"""The selection's verdicts and reasons."""

import pytest

from isheep.config import SELECT_METHODS, SelectConfig
from isheep.filter.select import METHODS, select

BOTH = ("quality", "following")


def scored(quality, following):
    return {"id": "x", "quality_score": quality, "following_score": following}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (scored(9, 9), None),
        (scored(10, 10), None),
        (scored(8, 9), "low_quality"),  # strictly above 8
        (scored(9, 8), "low_following"),
        (scored(5, None), "low_quality"),  # following is asked only of those that pass quality
        (scored(9, None), "no_score"),
        (scored(None, 9), "no_score"),
        ({"id": "x"}, "no_score"),
    ],
)
def test_threshold(row, reason):
    (got,) = select([row], SelectConfig(), BOTH)
    assert got == {**row, "verdict": "dropped" if reason else "kept", "reason": reason}


@pytest.mark.parametrize(
    ("scores", "row", "reason"),
    [
        (("quality",), scored(9, None), None),
        (("quality",), scored(8, 10), "low_quality"),
        (("quality",), scored(None, 10), "no_score"),
        (("following",), scored(None, 9), None),
        (("following",), scored(10, 8), "low_following"),
        (("following",), scored(10, None), "no_score"),
        ((), scored(1, None), None),
        ((), {"id": "x"}, None),
    ],
)
def test_only_the_scores_that_were_asked_for_are_tested(scores, row, reason):
    assert select([row], SelectConfig(), scores)[0]["reason"] == reason


@pytest.mark.parametrize(("threshold", "kept"), [(2, 3), (4, 3), (6, 2), (8, 1), (9, 0)])
def test_the_thresholds_of_the_ablation(threshold, kept):
    rows = [scored(9, 9), scored(10, 8), scored(6, 10), scored(2, 2), scored(None, 10)]
    verdicts = [row["verdict"] for row in select(rows, SelectConfig(threshold=threshold), BOTH)]
    assert verdicts.count("kept") == kept


@pytest.mark.parametrize(
    ("output_ppl", "pair_ppl", "reason"),
    [
        (49.9, 49.9, None),
        (50.0, 10.0, "high_output_ppl"),
        (10.0, 50.0, "high_pair_ppl"),
        (None, 10.0, "no_ppl"),
        (10.0, None, "no_ppl"),
    ],
)
def test_ppl(output_ppl, pair_ppl, reason):
    (got,) = select([{"output_ppl": output_ppl, "pair_ppl": pair_ppl}], SelectConfig(method="ppl"), ())
    assert got["reason"] == reason


def test_limits_come_from_the_settings():
    assert select([scored(6, 6)], SelectConfig(threshold=5), BOTH)[0]["verdict"] == "kept"
    assert select([{"output_ppl": 60, "pair_ppl": 60}], SelectConfig("ppl", max_ppl=70), ())[0]["verdict"] == "kept"


def test_earlier_drops_pass_through_and_nothing_is_changed_in_place():
    rows = [scored(9, 9), {"id": "y", "verdict": "dropped", "reason": "url"}, {**scored(1, 1), "verdict": "kept"}]
    before = [dict(row) for row in rows]
    got = select(rows, SelectConfig(), BOTH)
    assert [row["reason"] for row in got] == [None, "url", "low_quality"]
    assert got[1] == rows[1] and rows == before


def test_the_table_covers_the_settings():
    assert tuple(METHODS) == SELECT_METHODS
