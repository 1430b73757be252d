"""Every Triton kernel, compiled, on the yardstick of tests/kernels: odd shapes between fences, then true shapes."""

import pytest
import torch

from isheep_kernels import bench
from isheep_kernels.attention_packed import attention_packed, attention_packed_ref
from isheep_kernels.attention_paged import attention_paged, attention_paged_ref, write_kv_rope, write_kv_rope_ref
from isheep_kernels.linear_cross_entropy import IGNORE, fused_linear_cross_entropy, linear_cross_entropy_ref
from isheep_kernels.lora_matmul import Dropout, lora_matmul, lora_matmul_ref
from isheep_kernels.rms_norm import rms_norm, rms_norm_add, rms_norm_ref
from isheep_kernels.rope import rope, rope_ref
from isheep_kernels.sampling import sample, sample_ref
from isheep_kernels.swiglu import swiglu, swiglu_ref
from tests.kernels.draws import neighbours, parameters
from tests.kernels.fence import assert_kernel_is_as_good_as
from tests.kernels.yardstick import assert_as_good_as
from tests.paging import paged_batch, scattered_blocks

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run by `make test-gpu`"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
LENS = (1, 333, 0, 64, 700)
T = sum(LENS)


def randn(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def angles(dim):
    turns = torch.rand(T, dim // 2, generator=torch.Generator().manual_seed(9)) * 6
    return {"cos": turns.cos().to(DEVICE), "sin": turns.sin().to(DEVICE)}


@DTYPES
def test_rms_norm(dtype):
    x, residual, weight, dy = (
        randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(T, 577), (T, 577), (577,), (T, 577)])
    )
    frozen = {"weight": weight, "eps": torch.tensor(1e-5)}

    def plain(x, weight, eps):
        return rms_norm(x, weight, 1e-5)

    def plain_ref(x, weight, eps):
        return rms_norm_ref(x, weight, 1e-5)

    def added(x, residual, weight, eps):
        return rms_norm_add(x, residual, weight, 1e-5)

    def added_ref(x, residual, weight, eps):
        return rms_norm_ref(x + residual, weight, 1e-5), x + residual

    assert_kernel_is_as_good_as(plain, plain_ref, {"x": x}, frozen, [dy])
    assert_kernel_is_as_good_as(added, added_ref, {"x": x, "residual": residual}, frozen, [dy, dy.flip(0)])


@DTYPES
def test_rope_and_swiglu(dtype):
    q, k, dq, dk = (randn(T, h, 80, seed=i, dtype=dtype) for i, h in enumerate((6, 2, 6, 2)))

    def both(q, k, cos, sin):
        return rope_ref(q, cos, sin), rope_ref(k, cos, sin)

    assert_kernel_is_as_good_as(rope, both, {"q": q, "k": k}, angles(80), [dq, dk])
    gate, up, dy = (randn(T, 1111, seed=i, dtype=dtype) for i in range(3))
    assert_kernel_is_as_good_as(swiglu, swiglu_ref, {"gate": gate, "up": up}, {}, [dy])


@DTYPES
@pytest.mark.parametrize("vocab", [7, 5003, 152064])
def test_sample(dtype, vocab):
    logits, given = 3 * randn(64, vocab, seed=vocab, dtype=dtype), parameters(64, seed=vocab)
    tokens, logprobs = sample(logits, *(x.to(DEVICE) for x in given))
    tokens, logits = tokens.cpu(), logits.double().cpu()
    for row in (tokens != sample_ref(logits, *given)[0]).nonzero().squeeze(1).tolist():
        assert tokens[row].item() in neighbours(logits[row : row + 1], *(x[row : row + 1] for x in given))
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "dropped"])
@pytest.mark.parametrize("rows", [16, 50, T])
def test_lora_matmul(dtype, rows, dropped):
    K, N, R = 577, 333, 12
    x, a, dy = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(rows, K), (R, K), (rows, N)]))
    w, b, bias = (randn(*s, seed=5 + i, dtype=dtype) for i, s in enumerate([(N, K), (N, R), (N,)]))
    dropout = Dropout(0.25, 11 << 33, torch.arange(rows, device=DEVICE) << 30) if dropped else None

    def of(function):
        return lambda x, a, b, w, bias: function(x, w, bias, a, b, 2.0, dropout)

    frozen = {"w": w / K**0.5, "bias": bias}
    inputs = {"x": x, "a": a / K**0.5, "b": b}
    assert_kernel_is_as_good_as(of(lora_matmul), of(lora_matmul_ref), inputs, frozen, [dy])


@DTYPES
def test_linear_cross_entropy(dtype):
    hidden, weight = randn(T, 577, seed=0, dtype=dtype), randn(3333, 577, seed=1, dtype=dtype) / 24
    targets = torch.randint(3333, (T,), generator=torch.Generator().manual_seed(2))
    targets[::3] = IGNORE

    def reference(hidden, weight, targets):
        if hidden.dtype == torch.float64:  # the definition's loss is fp32
            logits = hidden @ weight.t()
            return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        return linear_cross_entropy_ref(hidden, weight, targets)

    frozen = {"weight": weight, "targets": targets.to(DEVICE)}
    grads = [randn(T, seed=3, dtype=torch.float32)]
    assert_kernel_is_as_good_as(fused_linear_cross_entropy, reference, {"hidden": hidden}, frozen, grads)


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True], ids=["one sweep", "two sweeps"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 64), (8, 2, 80), (6, 2, 96), (4, 1, 128), (2, 1, 256)]
)
def test_attention_packed(dtype, heads, kv_heads, head_dim, deterministic):
    q, k, v, dy = (randn(T, h, head_dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads, heads)))
    ends = torch.tensor((0, *LENS)).cumsum(0)
    scale = head_dim**-0.5

    def kernel(q, k, v, cu):
        return attention_packed(q, k, v, cu, scale, deterministic)

    def reference(q, k, v, cu):
        return attention_packed_ref(q, k, v, ends.tolist(), scale)

    frozen = {"cu": ends.int().to(DEVICE)}
    assert_kernel_is_as_good_as(kernel, reference, {"q": q, "k": k, "v": v}, frozen, [dy])


@DTYPES
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize("chunks", [[(1, 1), (1, 333), (1, 2000)], [(1, 700), (64, 64), (333, 1000), (7, 900)]])
def test_paged_attention_and_its_cache(dtype, chunks, splits):
    heads, kv_heads, dim, size = 8, 2, 128, 16
    lens = [length for _, length in chunks]
    num_blocks = 2 + 2 * sum(-(-n // size) for n in lens)
    blocks = scattered_blocks(lens, size, num_blocks)
    whole = paged_batch([([0] * n, 0) for n in lens], blocks, size)
    q, k, v = (randn(whole.num_tokens, h, dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads)))
    turns = whole.positions[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    given = (turns.cos().to(DEVICE), turns.sin().to(DEVICE), whole.paged.slot_mapping.to(DEVICE))
    caches = {}
    for write, kind in ((write_kv_rope, dtype), (write_kv_rope_ref, dtype), (write_kv_rope_ref, torch.float64)):
        pair = [torch.zeros(num_blocks, size, kv_heads, dim, dtype=kind, device=DEVICE) for _ in range(2)]
        turned = write(*(x.to(kind) for x in (q, k, v)), *given, *pair)
        caches[write, kind] = [turned, *pair]
    for triple in zip(*caches.values(), strict=True):
        assert_as_good_as(*triple)

    batch = paged_batch([([0] * n, length - n) for n, length in chunks], blocks, size)
    where = [x.to(DEVICE) for x in (batch.cu_seqlens, batch.paged.context_lens, batch.paged.block_tables)]
    asked = q[: batch.num_tokens]
    _, *cache = caches[write_kv_rope, dtype]
    longest = max(n for n, _ in chunks), max(lens)
    got = attention_paged(asked, *cache, *where, *longest, dim**-0.5, splits)
    ref, truth = (
        attention_paged_ref(asked.to(kind), *(x.to(kind) for x in cache), *where, dim**-0.5)
        for kind in (dtype, torch.float64)
    )
    assert_as_good_as(got, ref, truth)


@pytest.mark.parametrize("op", bench.OPS)
def test_true_shapes(op):
    for case in bench.OPS[op]("qwen1.5-7b", bench.MODELS["qwen1.5-7b"]):
        assert bench.is_right(case, case.inputs()), case.shape
