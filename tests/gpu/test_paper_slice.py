"""Eight of the 72B's eighty layers, at their true width with random weights, through every phase of the loop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isheep import score
from isheep.config import RunConfig, SamplerConfig, model_preset
from isheep.model.config import ModelConfig
from isheep.model.lora import LoRAConfig, attach
from isheep.model.sizes import Sizes, parameter_shapes
from isheep.model.transformer import Transformer
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request, SamplingParams
from isheep.text.tokenizer import load_tokenizer
from isheep.train.data import Example
from isheep.train.trainer import Trainer
from tests.tiny_tokenizer import write_tiny_tokenizer

NEEDED_GIB = 40
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < NEEDED_GIB * 2**30,
        reason=f"needs a CUDA device of {NEEDED_GIB} GiB",
    ),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    preset = model_preset("qwen1.5-72b")
    assert preset is not None
    config = replace(ModelConfig.from_dict(preset.architecture), num_hidden_layers=8)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    attach(model, LoRAConfig(), "a")
    return model


def test_prefill_and_decode(model: Transformer, tmp_path: Path) -> None:
    """Prompts in chunks beside decodes."""
    write_tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    cfg = SamplerConfig(kv_cache_gib=2.0, max_num_batched_tokens=512)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    requests = [Request(str(i), tuple(range(10, 10 + n)), params) for i, n in enumerate((5, 700, 64, 1))]
    completions = Sampler(model, tokenizer, cfg).generate(requests)
    assert [len(c.token_ids) for c in completions] == [8] * 4
    for completion in completions:
        assert completion.logprobs is not None
        assert all(-30 < entry["logprob"] <= 0 for entry in completion.logprobs)


def test_score(model: Transformer) -> None:
    rows = [(list(range(100, 400)), list(range(50, 400))), (list(range(9)), list(range(20)))]
    scores, vectors = score._score(model, rows, "a", True)
    assert vectors.shape == (2, len(score.POOLINGS), model.config.hidden_size)
    assert torch.isfinite(vectors).all()
    for row in scores:  # random weights know nothing: about as surprised as a guess among all tokens
        assert 1e4 < row["pair_ppl"] < 1e7


def test_train_step_within_its_plan(model: Transformer) -> None:
    """Loss and gradients are numbers, only the adapter changes, and the memory is what the plan says."""
    rows = [Example(tuple(range(7, 7 + n)), n // 2) for n in (600, 900, 300, 1000, 1000)]
    cfg = RunConfig(model="qwen1.5-72b", out="unused", iterations=1)
    trainer = Trainer(model, model.adapters["a"], rows, [], replace(cfg.train, warmup_steps=0), seed=0)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weight.clone()
    torch.cuda.reset_peak_memory_stats()
    with trainer.training():
        first, second = (trainer.step(trainer.steps[0]) for _ in range(2))
    assert second["loss"] < first["loss"] and first["grad_norm"] > 0
    assert torch.equal(before, weight)
    planned = Sizes(model.config, cfg, parameter_shapes(model.config), 1, 1).training().bytes
    assert torch.cuda.max_memory_allocated() < 1.1 * planned
