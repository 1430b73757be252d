"""The selection's verdicts and reasons."""

from collections import Counter

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


def clustered(*clusters):
    return [{"id": i, "cluster": k} for i, k in enumerate(clusters)]


def kept(rows, method, key=""):
    return [row["id"] for row in select(rows, SelectConfig(method), (), key) if row["verdict"] == "kept"]


def test_density_keeps_one_row_of_each_cluster():
    rows = clustered(3, 0, 3, 3, 7, 0)
    got = select(rows, SelectConfig("density"), (), "0/iter1")
    for cluster, num_rows in ((0, 2), (3, 3), (7, 1)):
        reasons = [row["reason"] for row in got if row["cluster"] == cluster]
        assert sorted(reasons, key=str) == [None] + ["same_cluster"] * (num_rows - 1)


def test_density_draws_each_row_as_often_and_each_cluster_by_itself():
    counts = Counter(kept(clustered(0, 0, 0), "density", str(key))[0] for key in range(300))
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 70
    for key in map(str, range(20)):
        few, more = clustered(0, 0, 0, 1), clustered(0, 0, 0, 1, 1, 2)
        assert kept(few, "density", key)[0] == kept(more, "density", key)[0]
        assert kept(few, "density", key) == kept(few, "density", key)


def test_density_ppl_keeps_the_lowest_pair_ppl_of_each_cluster():
    ppls = (9.0, 4.0, 4.0, None, 2.0, None, 3.0)
    rows = [row | {"pair_ppl": ppl} for row, ppl in zip(clustered(0, 0, 0, 0, 1, 2, 1), ppls)]
    got = [row["reason"] for row in select(rows, SelectConfig("density_ppl"), ())]
    assert got == ["same_cluster", None, "same_cluster", "no_ppl", None, "no_ppl", "same_cluster"]


@pytest.mark.parametrize("method", ["density", "density_ppl"])
def test_rows_dropped_before_have_no_cluster_and_stay_dropped(method):
    dropped = {"id": "y", "verdict": "dropped", "reason": "url"}
    got = select([dropped, {"id": "x", "cluster": 0, "pair_ppl": 3.0}], SelectConfig(method), ())
    assert got[0] == dropped and got[1]["verdict"] == "kept"


def test_the_table_covers_the_settings():
    assert tuple(METHODS) == SELECT_METHODS
