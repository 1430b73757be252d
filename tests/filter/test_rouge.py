"""ROUGE-L against the textbook's dynamic programming and against Google's package."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isheep.filter.rouge import RougePool, rouge_l, rouge_tokens

# Few different words, so that matches and carries are dense; more than 128 of them fill three machine words.
texts = st.lists(st.sampled_from("abcd"), max_size=200).map(" ".join)


def lcs_by_table(a: list[str], b: list[str]) -> int:
    above = [0] * (len(b) + 1)
    for x in a:
        line = [0]
        for j, y in enumerate(b):
            line.append(above[j] + 1 if x == y else max(above[j + 1], line[j]))
        above = line
    return above[-1]


def f_by_table(a: str, b: str) -> float:
    x, y = rouge_tokens(a), rouge_tokens(b)
    return 2 * lcs_by_table(x, y) / (len(x) + len(y)) if x and y else 0.0


def pool_of(members: list[str]) -> RougePool:
    pool = RougePool()
    for member in members:
        pool.add(member)
    return pool


def test_tokens():
    assert rouge_tokens("It's 3.5 CAFÉS—naïve_Name!") == ["it", "s", "3", "5", "caf", "s", "na", "ve", "name"]
    assert rouge_tokens("你好 …") == []


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=6), texts)
def test_exact_for_any_texts(members, text):
    want = [f_by_table(text, member) for member in members]
    assert [rouge_l(text, member) for member in members] == want
    got = pool_of(members).similarities(text)
    assert got.dtype == np.float64 and got.tolist() == want


def test_a_growing_pool_gives_what_a_new_one_gives():
    draw = random.Random(0)
    members = [" ".join(draw.choices("abcdefghij", k=draw.choice([0, 3, 20, 64, 65, 128, 129]))) for _ in range(120)]
    pool = RougePool()
    for i, member in enumerate(members):
        assert pool.similarities(member).tolist() == [rouge_l(member, other) for other in members[:i]]
        pool.add(member)
    assert len(pool) == 120


def test_a_carry_runs_through_a_word_without_matches():
    # "x" in the first and the third machine word: one candidate token can match only one of them.
    member = " ".join(["a"] * 63 + ["x"] + ["b"] * 64 + ["x"])
    assert pool_of([member]).similarities("x").tolist() == [2 * 1 / (129 + 1)]


def test_exactly_the_threshold_is_not_above_it():
    (f,) = pool_of(["a b c d e f g h i j"]).similarities("a b c d e f g x y z")
    assert f == 0.7


def test_sides_without_tokens_are_not_alike():
    assert pool_of(["", "…", "a"]).similarities("").tolist() == [0, 0, 0]
    assert RougePool().similarities("a").shape == (0,)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(texts, st.text(max_size=40)), min_size=1, max_size=3), texts)
def test_same_as_the_rouge_score_package(members, text):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    theirs = [scorer.score(member, text)["rougeL"].fmeasure for member in members]
    np.testing.assert_allclose(pool_of(members).similarities(text), theirs, atol=1e-12)
