import pytest
import torch

from isheep.model import ops
from isheep_kernels import sampling
from isheep_kernels.sampling import sample, sample_ref
from tests.kernels.draws import neighbours, parameters
from tests.kernels.fence import INTERPRETED, fenced, poisoned
from tests.kernels.yardstick import assert_as_good_as, needs_compiler, randn

SHARPNESS = {"flat": 0.0, "usual": 2.0, "peaked": 30.0}


@needs_compiler
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("vocab", [1, 7, 33, 320, 5003])
def test_same_token_as_the_definition(vocab, sharpness):
    logits = randn(300, vocab, seed=vocab) * SHARPNESS[sharpness]
    logits[100:200].masked_fill_(randn(100, vocab, seed=1) > 0.3, -torch.inf)
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)  # a row needs one possible token
    given = parameters(300, seed=vocab)
    tokens, logprobs = ops.sample(logits, *given)
    expected, expected_logprobs = sample_ref(logits, *given)
    differs = (tokens != expected).nonzero().squeeze(1).tolist()
    assert len(differs) <= 1  # rounding may move one draw across a boundary; then it lies on the boundary:
    for row in differs:
        assert tokens[row].item() in neighbours(logits[row : row + 1], *(p[row : row + 1] for p in given))
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-6)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert expected_logprobs.isfinite().all()


@pytest.mark.parametrize(
    ("draw", "n"),
    [(sample_ref, 20_000), pytest.param(ops.sample, 20_000, marks=needs_compiler), (sample, 40)],
    ids=["torch", "cpp", "triton"],
)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "survivors"),
    [
        (1.0, 0, 1.0, 0.0, [0, 1, 2, 3, 4, 5]),
        (0.7, 0, 1.0, 0.0, [0, 1, 2, 3, 4, 5]),
        (1.0, 3, 1.0, 0.0, [1, 3, 4]),
        (1.0, 0, 0.6, 0.0, [1, 3]),
        (1.0, 0, 1.0, 0.5, [1, 3]),
        (1.0, 4, 0.8, 0.1, [1, 3, 4]),
        (2.0, 1, 1.0, 0.0, [3]),
    ],
)
def test_frequencies(draw, n, temperature, top_k, top_p, min_p, survivors):
    """Uniform numbers on a grid must give each survivor exactly its share, to a grid step."""
    probs = torch.tensor([0.05, 0.25, 0.1, 0.4, 0.15, 0.05], dtype=torch.float64)
    weights = torch.zeros(6, dtype=torch.float64)
    weights[survivors] = probs[survivors] ** (1 / temperature)
    rows = [torch.full((n,), x, dtype=t) for x, t in ((temperature, torch.float32), (top_k, torch.int32))]
    rows += [torch.full((n,), x) for x in (top_p, min_p)]
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = draw(probs.log().float().expand(n, 6).contiguous(), *rows, grid)
    counts = torch.bincount(tokens, minlength=6)
    assert (counts - n * weights / weights.sum()).abs().max() <= 2


@needs_compiler
def test_ties_go_to_the_lower_id():
    flat = torch.zeros(4, 1000)
    given = [torch.tensor(x) for x in ([0.0, 1.0, 1.0, 1.0], [0, 3, 0, 0], [1.0, 1.0, 0.0015, 1e-9], [0.0] * 4)]
    given[1] = given[1].to(torch.int32)
    last = torch.full((4,), 1 - 2**-53, dtype=torch.float64)
    tokens, _ = ops.sample(flat, *given, last)
    assert tokens.tolist() == [0, 2, 1, 0] == sample_ref(flat, *given, last)[0].tolist()


@needs_compiler
def test_the_largest_uniform_number_never_reaches_an_impossible_token():
    logits = torch.full((1, 70_001), -torch.inf)
    logits[0, 5:40_000:7] = randn(len(range(5, 40_000, 7)), seed=0)
    for top_k in (0, 10, 10**6):
        given = torch.ones(1), torch.tensor([top_k], dtype=torch.int32), torch.ones(1), torch.zeros(1)
        token, logprob = ops.sample(logits, *given, torch.tensor([1 - 2**-53], dtype=torch.float64))
        assert logits[0, token[0]].isfinite() and logprob.isfinite().all()


@needs_compiler
def test_bf16_logits_draw_what_their_fp32_copies_draw():
    logits = (randn(200, 777, seed=0) * 3).to(torch.bfloat16)
    given = parameters(200, seed=5)
    assert torch.equal(ops.sample(logits, *given)[0], ops.sample(logits.float(), *given)[0])


# ---- in Triton -------------------------------------------------------------------------------------------------------

LARGEST = 1 - 2**-53  # uniform


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a short row takes several, the last one in part."""
    monkeypatch.setattr(sampling, "BLOCK", 128)


def drawn(logits, *given):
    """Tokens and log-probabilities by Triton, between fences and over poison."""
    with poisoned():
        return sample(fenced(logits), *(fenced(p) for p in given))


def assert_drawn_as_defined(logits, *given):
    """Each token is the fp64 definition's, or that of inputs a millionth away -> how many are not the definition's."""
    tokens, logprobs = drawn(logits, *given)
    truth, expected = sample_ref(logits.double(), *given)
    differs = (tokens != truth).nonzero().squeeze(1).tolist()
    for row in differs:
        assert tokens[row].item() in neighbours(logits[row : row + 1].double(), *(p[row : row + 1] for p in given))
    same = tokens == truth
    by_definition = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert_as_good_as(logprobs[same], by_definition[same], expected[same])
    return len(differs)


@INTERPRETED
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize(("rows", "vocab"), [(6, 1), (12, 7), (21, 320)])
def test_the_triton_kernel(rows, vocab, sharpness, dtype, small_blocks):
    logits = randn(rows, vocab, seed=vocab) * SHARPNESS[sharpness]
    logits[: rows // 3].masked_fill_(randn(rows // 3, vocab, seed=1) > 0.3, -torch.inf)
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
    assert assert_drawn_as_defined(logits.to(dtype), *parameters(rows, seed=vocab)) == 0


ROWS = {
    "equal": torch.zeros(150),
    "zeros of both signs": torch.zeros(150).copysign(randn(150, seed=0)),
    "ties": (randn(150, seed=1) * 2).round(),
    "masked": torch.where(randn(150, seed=2) > 0.5, randn(150, seed=3), -torch.inf),
    "one possible": torch.full((150,), -torch.inf).index_fill(0, torch.tensor([137]), -7.0),
    "far apart": randn(150, seed=4) * 500,
    "rising": torch.arange(150) / 8,
}
HARD = [  # temperature, top-k, top-p, min-p, uniform
    (0.0, 0, 1.0, 0.0, LARGEST), (0.0, 5, 0.5, 0.5, 0.37), (1e-3, 0, 1.0, 0.0, 0.37), (1e-3, 7, 0.7, 1e-4, LARGEST),
    (1.0, 0, 1.0, 0.0, 1e-9), (1.0, 0, 1.0, 0.0, LARGEST), (1.0, 1, 1.0, 0.0, LARGEST), (1.0, 128, 1.0, 0.0, LARGEST),
    (1.0, 149, 0.9999, 0.0, LARGEST), (1.0, 150, 1.0, 0.0, 0.37), (1.0, 10**6, 0.5, 0.0, LARGEST),
    (1.0, 0, 1e-9, 0.0, LARGEST), (1.0, 0, 0.5, 0.0, LARGEST), (1.0, 0, 1.0, 1.0, LARGEST), (1.0, 0, 1.0, 0.5, 0.0),
    (1.0, 40, 0.8, 0.1, LARGEST), (100.0, 0, 0.7, 0.0, 0.37), (100.0, 149, 1.0, 0.0, 0.0),
]  # fmt: skip


def columns(rows):
    types = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    return [torch.tensor(column, dtype=t) for column, t in zip(zip(*rows, strict=True), types, strict=True)]


@INTERPRETED
@pytest.mark.parametrize("kind", ROWS)
def test_hard_rows_in_triton(kind, dtype, small_blocks):
    logits = ROWS[kind].to(dtype).expand(len(HARD), 150)
    assert_drawn_as_defined(logits, *columns(HARD))


def test_shares_in_triton():
    """Chi-square of independent draws; the definition's shares in fp64 are those of a fine grid of uniforms."""
    n, fine, logits, cut = 150, 100_000, randn(1, 100, seed=6) * 2, (0.8, 0, 0.9, 0.01)
    given = columns([(*cut, u) for u in torch.rand(n, generator=torch.Generator().manual_seed(7)).tolist()])
    grid = columns([(*cut, (i + 0.5) / fine) for i in range(fine)])
    shares = torch.bincount(sample_ref(logits.double().expand(fine, 100), *grid)[0], minlength=100) / fine
    counts = torch.bincount(sample(logits.expand(n, 100), *given)[0], minlength=100)
    assert counts[shares == 0].sum() == 0
    terms = ((counts - n * shares).square() / (n * shares))[shares > 0]
    freedom = len(terms) - 1
    assert freedom >= 8 and terms.sum() < freedom + 3 * (2 * freedom) ** 0.5


def test_rows_without_a_possible_token_harm_no_other(small_blocks):
    logits = randn(3, 150, seed=8).repeat_interleave(2, 0)
    alone = drawn(logits, *columns(HARD[6:12]))
    logits[0], logits[1], logits[4, 77] = -torch.inf, torch.nan, torch.nan
    tokens, logprobs = drawn(logits, *columns(HARD[6:12]))
    assert logprobs.isnan().tolist() == [True, True, False, False, True, False]
    assert ((tokens >= 0) & (tokens < 150)).all()
    for row in (2, 3, 5):
        assert tokens[row] == alone[0][row] and logprobs[row] == alone[1][row]


def test_rows_that_lie_apart_in_triton():
    wide = randn(6, 60, seed=9)
    given = columns(HARD[7:10])
    for apart in (wide[::2, :40], wide[:, :3].t()):
        assert torch.equal(sample(apart, *given)[0], sample_ref(apart, *given)[0])
    assert [x.shape for x in sample(wide[:0], *(p[:0] for p in given))] == [(0,), (0,)]


def test_what_does_not_fit_is_an_error():
    logits, given = torch.zeros(2, 5), columns(HARD[:2])
    for i, wrong in enumerate([given[0][:1], given[1].long(), given[2].double(), given[3][:, None], given[4].float()]):
        with pytest.raises(ValueError, match="sample: logits, temperature"):
            sample(logits, *given[:i], wrong, *given[i + 1 :])
    with pytest.raises(ValueError, match="float64"):
        sample(logits.double(), *given)
