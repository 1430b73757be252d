"""Texts from CUDA graphs are those of passes kernel by kernel, and of the CPU."""

from dataclasses import replace
from itertools import count
from weakref import WeakKeyDictionary

import pytest
import torch

from isheep.config import SamplerConfig
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
CFG = SamplerConfig(kv_cache_gib=0.01, max_num_seqs=16)
LENS = [(250, 40), (3, 5), (40, 20), (1, 5), (100, 9), *[(n, 12) for n in range(7, 12)]]  # of a prompt, of its answer
PARAMS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that a graph was replayed, the graph's own: held here, none would ever be dropped."""
    numbers: WeakKeyDictionary[torch.cuda.CUDAGraph, int] = WeakKeyDictionary()
    found, unused, replay = list[int](), count(), torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        found.append(numbers.setdefault(graph, next(unused)))
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return found


def adapted(name: str):
    model = tiny_model(name)
    for adapter, seed in (("one", 1), ("two", 2)):
        generator = torch.Generator().manual_seed(seed)
        for parameter in attach(model, LoRAConfig(), adapter).parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def requests(adapter: str | None) -> list[Request]:
    """From ten rows down to one; the longest context passes 256, from where on its keys are split."""
    prompts = [tuple((7 * i + n) % 300 for i in range(n)) for n, _ in LENS]
    found = zip(prompts, (n for _, n in LENS), strict=True)
    return [Request(str(i), ids, replace(PARAMS, max_tokens=n), adapter) for i, (ids, n) in enumerate(found)]


def all_texts(model, tokenizer, cfg: SamplerConfig) -> list[list[int]]:
    """Of the base, of an adapter, of two together, and of one that is trained between two calls."""
    sampler, found = Sampler(model, tokenizer, cfg), []
    mixed = [replace(each, adapter=("one", "two")[i % 2]) for i, each in enumerate(requests(None))]
    for asked in (requests(None), requests("one"), mixed):
        found += sampler.generate(asked)
    with torch.no_grad():
        for pair in model.adapters["one"].pairs.values():
            pair.lora_B.mul_(-2)
    found += sampler.generate(requests("one"))
    sampler.close()
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_texts(name, tmp_path, replays):
    write_tiny_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = all_texts(adapted(name), tokenizer, CFG)
    one_by_one = all_texts(adapted(name).cuda(), tokenizer, replace(CFG, cuda_graphs=False))
    assert not replays
    assert one_by_one == expected
    assert all_texts(adapted(name).cuda(), tokenizer, CFG) == expected
    # three runs of 39 decode steps, each with a graph for 16, 8, 2 and 1 rows, and one more once keys are split
    assert len(replays) >= 3 * 39 and len(set(replays)) <= 3 * 6


@pytest.mark.parametrize("adapter", [None, "one"])
def test_more_rows_than_one_launch_multiplies(adapter, tmp_path, replays):
    write_tiny_tokenizer(tmp_path)
    tokenizer, params = load_tokenizer(tmp_path), replace(PARAMS, max_tokens=6)
    asked = [Request(str(i), (5 + i, *range(i % 5)), params, adapter) for i in range(70)]  # padded to 72
    found = []
    for model in (adapted("qwen2_mha"), adapted("qwen2_mha").cuda()):
        sampler = Sampler(model, tokenizer, replace(CFG, max_num_seqs=80))
        found.append([completion.token_ids for completion in sampler.generate(asked)])
        sampler.close()
    assert found[0] == found[1] and len(replays) == 5


def test_a_closed_sampler_leaves_no_memory(tmp_path):
    write_tiny_tokenizer(tmp_path)
    tokenizer, model = load_tokenizer(tmp_path), adapted("llama_gqa").cuda()
    all_texts(model, tokenizer, CFG)
    held = torch.cuda.memory_allocated()
    all_texts(model, tokenizer, CFG)
    assert torch.cuda.memory_allocated() == held
