"""The kernels for Hopper alone, compiled, on the yardstick of tests/kernels.

They run in a process of their own, with a limit of time: a barrier that is waited for in vain would hold the GPU.
"""

from itertools import accumulate

import pytest
import torch

from isheep_kernels import attention_hopper, lora_hopper
from isheep_kernels.attention_packed import attention_packed, attention_packed_ref
from isheep_kernels.lora_matmul import lora_matmul, lora_matmul_ref
from tests.kernels.fence import assert_kernel_is_as_good_as

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU; run by `make test-gpu`",
    ),
]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("ISHEEP_KERNELS", "hopper")


def randn(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@HALVES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 128), (16, 2, 128)])
@pytest.mark.parametrize("lens", [(1, 40), (1, 129, 0, 700, 64, 128, 0), (3, 5) * 200, (4096, 33)], ids=str)
def test_attention(heads, kv_heads, head_dim, deterministic, lens, dtype):
    names = {"q": heads, "k": kv_heads, "v": kv_heads}
    inputs = {n: randn(sum(lens), h, head_dim, seed=i, dtype=dtype) for i, (n, h) in enumerate(names.items())}
    assert attention_hopper.serves(*inputs.values())
    ends, scale = [0, *accumulate(lens)], head_dim**-0.5
    cu = torch.tensor(ends, dtype=torch.int32, device="cuda")

    def kernel(q, k, v, cu):
        return attention_packed(q, k, v, cu, scale, deterministic)

    def reference(q, k, v, cu):
        return attention_packed_ref(q, k, v, ends, scale)

    grads = [randn(sum(lens), heads, head_dim, seed=9, dtype=dtype)]
    assert_kernel_is_as_good_as(kernel, reference, inputs, {"cu": cu}, grads)


@HALVES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(65, 72, 264, 8), (1000, 576, 1536, 16), (4096, 4096, 11008, 80)], ids=str)
def test_lora_matmul(shape, bias, dtype):
    T, K, N, R = shape
    shapes = {"x": (T, K), "a": (R, K), "b": (N, R)}
    trained = {n: randn(*shape, seed=sum(shape), dtype=dtype) / shape[1] ** 0.5 for n, shape in shapes.items()}
    frozen = {"w": randn(N, K, seed=6, dtype=dtype) / K**0.5}
    frozen |= {"bias": randn(N, seed=7, dtype=dtype)} if bias else {}
    assert lora_hopper.serves(trained["x"], frozen["w"], R)

    def kernel(x, a, b, w, bias=None):
        return lora_matmul(x, w, bias, a, b, 2.0)

    def reference(x, a, b, w, bias=None):
        return lora_matmul_ref(x, w, bias, a, b, 2.0)

    assert_kernel_is_as_good_as(kernel, reference, trained, frozen, [randn(T, N, seed=8, dtype=dtype)])
