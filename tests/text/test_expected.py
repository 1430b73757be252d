"""Expected scores: how tokenizers write 1 to 10, and the mean over exact probabilities of whole strings."""

import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from isheep.config import UserError
from isheep.text.expected import ScoreTokens, score_tokens
from isheep.text.prompts import LEAD_IN
from isheep.text.tokenizer import Tokenizer, load_tokenizer
from tests.scripted import tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


def bpe(*merges: str, digits: bool = False) -> Tokenizer:
    """A byte-level tokenizer with these merges "left right"."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs), "<end>"]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    parts = [pre_tokenizers.Digits(individual_digits=True)] * digits
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, backend.token_to_id("<end>"))


def texts(tokenizer: Tokenizer, found: ScoreTokens) -> tuple[str, dict[int, list[str]], str]:
    def text(*ids: int) -> str:
        return tokenizer.decode(list(ids))

    return text(*found.blank), {n: [text(i) for i in tail] for n, tail in found.tails.items()}, text(*found.stem)


DIGITS = {n: [str(n)] for n in range(1, 10)}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (bpe(), (" ", {**DIGITS, 10: ["1", "0"]}, "1")),
        (bpe(digits=True), (" ", {**DIGITS, 10: ["1", "0"]}, "1")),
        (bpe("1 0"), (" ", {**DIGITS, 10: ["10"]}, "")),
        (bpe(*(f"Ġ {n}" for n in range(1, 10))), ("", {**{n: [f" {n}"] for n in range(1, 10)}, 10: [" 1", "0"]}, " 1")),
    ],
    ids=["bytes", "digits", "ten is a token", "blanks belong to numbers"],
)
def test_how_numbers_are_written(tokenizer: Tokenizer, expected: tuple) -> None:
    assert texts(tokenizer, score_tokens(tokenizer, LEAD_IN)) == expected


def test_a_tokenizer_with_numbers_on_two_paths_is_refused() -> None:
    with pytest.raises(UserError, match='score_decoding = "expected" needs a tokenizer'):
        score_tokens(bpe("Ġ 1"), LEAD_IN)  # " 1" and "0", but " " and "2"


@pytest.mark.parametrize("name", [path.name for path in sorted(SHARED.glob("*"))] or [None])
def test_the_tokenizers_of_real_models(name: str | None) -> None:
    if name is None:
        pytest.skip("needs the shared tokenizers")
    tokenizer = load_tokenizer(SHARED / name)
    found = score_tokens(tokenizer, LEAD_IN)
    prompt = "Rate it.\n\n" + LEAD_IN
    for n, tail in found.tails.items():
        assert [*tokenizer.encode(prompt), *found.blank, *tail] == tokenizer.encode(f"{prompt} {n}")


def probabilities(tokens: ScoreTokens, after: list[dict[str, float]], tokenizer: Tokenizer) -> list[list[float]]:
    """Log-probabilities as `read` takes them; tokens not named have next to none."""
    named = [{tokenizer.encode(text)[0]: p for text, p in each.items()} for each in after]
    return [[math.log(each.get(token, 1e-12)) for token in tokens.token_ids] for each in named]


def test_ten_takes_from_one_what_follows_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokens = score_tokens(tokenizer, LEAD_IN)
    given = probabilities(tokens, [{"1": 0.4, "8": 0.2, "7": 0.1}, {"0": 0.75}], tokenizer)
    score, mass, shares = tokens.read(given)
    # one: 0.4 · 0.25, ten: 0.4 · 0.75, eight: 0.2, seven: 0.1; 0.3 of all is no score
    assert mass == pytest.approx(0.7)
    assert shares == pytest.approx([0.1 / 0.7, 0, 0, 0, 0, 0, 0.1 / 0.7, 0.2 / 0.7, 0, 0.3 / 0.7], abs=1e-9)
    assert score == pytest.approx((0.1 * 1 + 0.1 * 7 + 0.2 * 8 + 0.3 * 10) / 0.7)


def test_however_improbable_there_is_a_score(tmp_path: Path) -> None:
    tokens = score_tokens(tiny_tokenizer(tmp_path), LEAD_IN)
    level = [-2000.0 - token for token in range(len(tokens.token_ids))]
    score, mass, shares = tokens.read([level, [-5.0] * len(level)])
    assert mass == 0.0 and sum(shares) == pytest.approx(1) and 1 <= score <= 10
