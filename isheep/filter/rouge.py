"""ROUGE-L of a text against everything kept so far, fast enough to ask for each candidate.

F = 2·LCS / (m + n) over tokens, LCS the longest common subsequence of texts of m and n tokens. The LCS is exact and
bit-parallel: a text of n tokens is a row of n bits, and a token of the other text changes the whole row with one
addition (H. Hyyrö, "Bit-parallel LCS-length computation revisited", 2004). `RougePool` keeps the bits of all its texts
in numpy and, for each token of the candidate, touches only the texts that contain it.
"""

import re
from typing import Any

import numpy as np

WORD_BITS = 64


def rouge_tokens(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9, not stemmed; everything else separates."""
    return re.findall("[a-z0-9]+", text.lower())


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F of two texts, 0 where either has no token."""
    ours, others = rouge_tokens(a), rouge_tokens(b)
    if not ours or not others:
        return 0.0
    row = (1 << len(ours)) - 1
    bits, masks = row, _masks(ours)
    for token in others:
        hits = bits & masks.get(token, 0)
        bits = ((bits + hits) | (bits - hits)) & row
    return 2 * (len(ours) - bits.bit_count()) / (len(ours) + len(others))


def _masks(tokens: list[str]) -> dict[str, int]:
    """Token -> the bits of its places."""
    masks: dict[str, int] = {}
    for place, token in enumerate(tokens):
        masks[token] = masks.get(token, 0) | 1 << place
    return masks


class RougePool:
    """Texts in the order they were added, and their ROUGE-L F to any other text."""

    def __init__(self) -> None:
        self._lengths = _Grown(np.int64)
        self._groups: dict[int, _Group] = {}  # texts by the number of 64-bit words that hold a bit per token

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, text: str) -> None:
        """Append a text. Costs its own length, whatever the pool holds."""
        tokens = rouge_tokens(text)
        num_words = max(1, -(-len(tokens) // WORD_BITS))
        self._groups.setdefault(num_words, _Group(num_words)).add(len(self), _masks(tokens))
        self._lengths.append(len(tokens))

    def similarities(self, text: str) -> np.ndarray:
        """F of `text` to each text of the pool, [len(pool)] float64 in the order of adding."""
        tokens = rouge_tokens(text)
        lcs = np.zeros(len(self))
        for group in self._groups.values():
            lcs[group.places.view] = group.lcs(tokens)
        return 2 * lcs / np.maximum(self._lengths.view + len(tokens), 1)


class _Group:
    """The pool's texts of one number of words W: for each token, which texts hold it, and where."""

    def __init__(self, num_words: int) -> None:
        self.num_words = num_words
        self.places = _Grown(np.int64)  # of this group's texts in the pool
        self.postings: dict[str, tuple[_Grown, _Grown]] = {}  # token -> rows of this group, their masks [W]

    def add(self, place: int, masks: dict[str, int]) -> None:
        row = len(self.places)
        self.places.append(place)
        for token, mask in masks.items():
            if token not in self.postings:
                self.postings[token] = _Grown(np.int64), _Grown(np.uint64, (self.num_words,))
            rows, words = self.postings[token]
            rows.append(row)
            words.append([mask >> WORD_BITS * w & (1 << WORD_BITS) - 1 for w in range(self.num_words)])

    def lcs(self, tokens: list[str]) -> np.ndarray:
        """Length of the longest common subsequence of `tokens` with each text, [rows] int64.

        A bit that turned 0 is one more token in common. Bits beyond a text's end stay 1: no mask touches them.
        """
        bits = np.full((self.num_words, len(self.places)), ~np.uint64(0))
        for token in tokens:
            if token in self.postings:
                rows, masks = self.postings[token]
                _advance(bits, rows.view, masks.view)
        return np.bitwise_count(~bits).sum(axis=0, dtype=np.int64)


def _advance(bits: np.ndarray, rows: np.ndarray, masks: np.ndarray) -> None:
    """One token, in place: with hits = bits & masks, bits become (bits + hits) | (bits - hits).

    bits [W, all rows]   rows [R], those with the token   masks [W, R]; columns are numbers of W words, low word first.
    """
    carry: np.ndarray | int = 0
    for w, (words, mask) in enumerate(zip(bits, masks)):
        old = words.take(rows)
        hits = old & mask
        added = old + hits
        if w + 1 < len(bits):
            overflow = added < old
            added += carry
            carry = overflow | (added < carry)
        else:
            added += carry
        words[rows] = added | (old ^ hits)


class _Grown:
    """A numpy array that grows by appending: `view` is the part in use, and room doubles when it runs out."""

    def __init__(self, dtype: type, shape: tuple[int, ...] = ()) -> None:
        self._room: np.ndarray = np.empty((*shape, 2), dtype=dtype)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def append(self, value: Any) -> None:
        if self._used == self._room.shape[-1]:
            self._room = np.concatenate([self._room, np.empty_like(self._room)], axis=-1)
        self._room[..., self._used] = value
        self._used += 1

    @property
    def view(self) -> np.ndarray:
        return self._room[..., : self._used]
