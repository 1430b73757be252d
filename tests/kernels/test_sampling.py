import pytest
import torch

from isheep.model import ops
from isheep_kernels.sampling import sample_ref
from tests.kernels.yardstick import needs_compiler, randn

SHARPNESS = {"flat": 0.0, "usual": 2.0, "peaked": 30.0}


def parameters(rows: int, seed: int):
    """A random mixture of everything, each truncation off in about half of the rows."""
    generator = torch.Generator().manual_seed(seed)

    def rand(dtype=torch.float32):
        return torch.rand(rows, generator=generator, dtype=dtype)

    def one_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    temperature = torch.where(rand() < 0.1, 0.0, 0.05 + 2 * rand())
    temperature = torch.where(rand() < 0.2, 1.0, temperature)
    top_k = torch.where(rand() < 0.5, 0, one_of(1, 2, 5, 40, 10**6)).to(torch.int32)
    top_p = torch.where(rand() < 0.5, 1.0, one_of(1e-6, 0.1, 0.5, 0.95, 0.9999))
    min_p = torch.where(rand() < 0.5, 0.0, one_of(1e-4, 0.05, 0.5, 1.0))
    return temperature, top_k, top_p, min_p, rand(torch.float64)


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


def neighbours(logits, temperature, top_k, top_p, min_p, uniform):
    """The definition's tokens when its inputs move by a part in a million."""
    return {
        sample_ref(logits, temperature, top_k, top_p * p, min_p * m, (uniform + u).clamp(0, 1 - 1e-16))[0].item()
        for p in (1 - 1e-6, 1, 1 + 1e-6)
        for m in (1 - 1e-6, 1, 1 + 1e-6)
        for u in (-1e-6, 0, 1e-6)
    }


@pytest.mark.parametrize("draw", [sample_ref, pytest.param(ops.sample, marks=needs_compiler)], ids=["torch", "cpp"])
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
def test_frequencies(draw, temperature, top_k, top_p, min_p, survivors):
    """Uniform numbers on a grid must give each survivor exactly its share, to a grid step."""
    probs = torch.tensor([0.05, 0.25, 0.1, 0.4, 0.15, 0.05], dtype=torch.float64)
    weights = torch.zeros(6, dtype=torch.float64)
    weights[survivors] = probs[survivors] ** (1 / temperature)
    n = 20_000
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
