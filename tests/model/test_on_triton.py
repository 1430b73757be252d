"""The whole model on the Triton kernels, in Triton's interpreter: what the definitions give, and how many launches."""

from collections import Counter

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from isheep.config import SamplerConfig
from isheep.model import ops
from isheep.model.batch import PackedBatch
from isheep.model.lora import LoRAConfig, attach
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request, SamplingParams
from isheep.text.tokenizer import load_tokenizer
from tests.tiny import tiny_model
from tests.tiny_tokenizer import write_tiny_tokenizer

SEQUENCES = [[5, 6, 7, 8], list(range(40)), [9], list(range(200, 227))]
CONFIGS = ("qwen3_head_dim", "llama_linear_rope_bias")  # a norm on the heads, tied; biases everywhere, scaled rope


def model_on(name: str):
    model = tiny_model(name, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(1)
    for parameter in attach(model, LoRAConfig(dropout=0.25), "a").parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """From here on Triton serves; counts each kernel's launches."""
    found, launch = Counter(), GridExecutor.__call__

    def counted(self, *args, **kwargs):
        found[self.fn.__name__] += 1
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    monkeypatch.setattr(ops, "backend", lambda x: "triton")
    return found


def loss_and_gradients(model) -> list[torch.Tensor]:
    batch = PackedBatch.pack(SEQUENCES, "cpu", adapter="a")
    adapter = model.adapters["a"]
    adapter.set_dropout(7, torch.arange(batch.num_tokens))
    hidden = model(batch)
    targets = batch.input_ids.roll(-1)
    targets[batch.cu_seqlens[1:].long() - 1] = ops.IGNORE
    nll = model.nll(hidden, targets, 16)
    nll.mean().backward()
    found = [hidden.detach(), nll.detach(), *(p.grad for p in adapter.parameters())]
    for parameter in adapter.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_pass(name, request):
    model = model_on(name)
    expected = loss_and_gradients(model)
    launches = request.getfixturevalue("launches")
    for got, ref in zip(loss_and_gradients(model), expected, strict=True):
        assert (got - ref).abs().max() <= 1e-4 * ref.abs().max()
    num_layers = len(model.model.layers)
    assert launches["_attention_packed_kernel"] == launches["_swiglu_kernel"] == num_layers
    norms = 2 * num_layers + 1 + 2 * num_layers * (name == "qwen3_head_dim")  # and one on q's, one on k's heads
    assert launches["_rms_norm_kernel"] == norms


def test_a_scoring_pass_shares_what_layers_have_in_common(request):
    model, sequences = model_on("llama_linear_rope_bias"), [*SEQUENCES, list(range(100, 110))]

    def hidden():
        with torch.no_grad():
            return model(PackedBatch.pack(sequences, "cpu", adapter="a"))

    expected = hidden()
    launches = request.getfixturevalue("launches")
    assert (hidden() - expected).abs().max() <= 1e-4 * expected.abs().max()
    # of a layer's seven: one for q, k and v, one for o, one for gate and up, one for down
    per_layer = {"_lora_down_kernel": 4, "_lora_product_kernel": 7, "_rope_kernel": 1, "_attention_packed_kernel": 1}
    per_layer |= {"_swiglu_kernel": 1, "_rms_norm_kernel": 2}
    num_layers = len(model.model.layers)
    assert launches == {name: n * num_layers + (name == "_rms_norm_kernel") for name, n in per_layer.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts(name, request, tmp_path):
    write_tiny_tokenizer(tmp_path)
    tokenizer, model = load_tokenizer(tmp_path), model_on(name)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    requests = [Request(str(i), tuple(ids), params, "a" if i % 2 else None) for i, ids in enumerate(SEQUENCES)]
    cfg = SamplerConfig(kv_cache_gib=0.01, max_num_batched_tokens=32)

    def texts():
        return [completion.token_ids for completion in Sampler(model, tokenizer, cfg).generate(requests)]

    expected = texts()
    launches = request.getfixturevalue("launches")
    assert texts() == expected
    assert launches["_attention_paged_kernel"] == launches["_write_kv_rope_kernel"] > 0
