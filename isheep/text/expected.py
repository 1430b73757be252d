"""The score that a model would give on average, from its probabilities alone: nothing is drawn and nothing is parsed.

After the lead-in "… my score is:" each of the numbers 1 to 10 has a probability, that of its whole string of tokens.
Where the string of one begins another's, as "1" does "10", it counts as far as the other does not follow. That a number
goes on beyond them, as in 95 or 100, is not seen: each would take a pass of its own, and all of them come from one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from isheep.config import UserError
from isheep.text.tokenizer import Tokenizer

SCORES = range(1, 11)


@dataclass(frozen=True)
class ScoreTokens:
    """How a tokenizer writes the scores after a lead-in.

    blank  tokens that all begin with; they end the prompt
    tails  score -> its tokens after them
    stem   the longest tail without its last token: all that must be read to know every probability
    """

    blank: tuple[int, ...]
    tails: Mapping[int, tuple[int, ...]]
    stem: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens whose probabilities matter."""
        return tuple(sorted({token for tail in self.tails.values() for token in tail}))

    def read(self, logprobs: Sequence[Sequence[float]]) -> tuple[float, float, list[float]]:
        """-> the expected score, the probability that a score's string comes next, and that of each score given one.

        logprobs [len(stem) + 1][len(token_ids)] are those of `token_ids` after the blank and each token of the stem.
        """
        place = {token: i for i, token in enumerate(self.token_ids)}
        whole = {
            score: sum(after[place[token]] for after, token in zip(logprobs, tail, strict=False))
            for score, tail in self.tails.items()
        }
        most = max(whole.values())  # so that what is improbable altogether still compares
        weights = {score: math.exp(logprob - most) for score, logprob in whole.items()}
        alone = [max(0.0, weights[score] - sum(weights[longer] for longer in self._longer(score))) for score in SCORES]
        total = sum(alone)
        shares = [weight / total for weight in alone]
        return sum(score * share for score, share in zip(SCORES, shares)), total * math.exp(most), shares

    def _longer(self, score: int) -> list[int]:
        """The scores whose string goes on where this one's ends."""
        tail = self.tails[score]
        return [other for other, longer in self.tails.items() if other != score and longer[: len(tail)] == tail]


def score_tokens(tokenizer: Tokenizer, lead_in: str) -> ScoreTokens:
    """How scores are written after `lead_in`; UserError where that cannot be told from single passes."""
    before = tokenizer.encode(lead_in)
    written = {score: tuple(tokenizer.encode(f"{lead_in} {score}")) for score in SCORES}
    num_same = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*written.values()))))
    goes_on = all(list(tokens[: len(before)]) == before for tokens in written.values())
    blank = written[1][len(before) : num_same]
    tails = {score: tokens[num_same:] for score, tokens in written.items()}
    stem = max(tails.values(), key=len)[:-1]
    on_one_path = all(tail and stem[: len(tail) - 1] == tail[:-1] for tail in tails.values())
    if not goes_on or not on_one_path:
        raise UserError(
            'assess.score_decoding = "expected" needs a tokenizer that writes the numbers 1 to 10 one after the other '
            'behind a text, which this one does not: choose "sampled" or "greedy".'
        )
    return ScoreTokens(blank, tails, stem)
