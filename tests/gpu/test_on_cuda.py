"""The whole path on a CUDA device against the same path on the CPU: forward, sampling, a training step."""

import pytest
import torch

from isheep.config import SamplerConfig
from isheep.model.batch import PackedBatch
from isheep.model.lora import LoRAConfig, attach
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request, SamplingParams
from isheep.text.tokenizer import load_tokenizer
from tests.tiny import CONFIGS, tiny_model
from tests.tiny_tokenizer import write_tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEQUENCES = [[5, 6, 7, 8], list(range(60)), [9], list(range(200, 240))]


def on_both(name: str):
    cpu, gpu = tiny_model(name), tiny_model(name).cuda()
    for model in (cpu, gpu):
        generator = torch.Generator().manual_seed(1)
        for parameter in attach(model, LoRAConfig(), "a").parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return cpu, gpu


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name):
    found = []
    for model in on_both(name):
        batch = PackedBatch.pack(SEQUENCES, model.device, adapter="a")
        hidden = model(batch)
        targets = batch.input_ids.roll(-1)
        model.nll(hidden, targets, 16).mean().backward()
        gradients = [p.grad.cpu() for p in model.adapters["a"].parameters()]
        found.append([model.logits(hidden).detach().cpu(), *gradients])
    for cpu, gpu in zip(*found, strict=True):
        assert (cpu - gpu).abs().max() <= 1e-4 * cpu.abs().max()


def test_greedy_texts(tmp_path):
    write_tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    requests = [Request(str(i), tuple(ids), params, "a" if i % 2 else None) for i, ids in enumerate(SEQUENCES)]
    texts = []
    for model in on_both("llama_gqa"):
        sampler = Sampler(model, tokenizer, SamplerConfig(kv_cache_gib=0.01, max_num_batched_tokens=32))
        texts.append([completion.token_ids for completion in sampler.generate(requests)])
    assert texts[0] == texts[1]
