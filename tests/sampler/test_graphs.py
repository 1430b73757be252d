"""Texts from graphs are those of passes kernel by kernel, whatever changes from step to step."""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch

from isheep.config import SamplerConfig
from isheep.model import ops
from isheep.model.lora import LoRAConfig, attach, detach
from isheep.sampler import graphs
from isheep.sampler.engine import Sampler
from isheep.sampler.graphs import padded_rows
from isheep.sampler.request import Request, SamplingParams
from isheep.text.tokenizer import load_tokenizer
from isheep_kernels import attention_paged
from isheep_kernels.swiglu import swiglu
from tests.sampler.fake_cuda_graph import Cuda
from tests.tiny import tiny_model
from tests.tiny_tokenizer import write_tiny_tokenizer

CFG = SamplerConfig(kv_cache_gib=0.0005, max_num_seqs=8)
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def model():
    shape = {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model("qwen2_gqa_tied", **shape)
    attach_numbers(model, "one", 0)
    attach_numbers(model, "two", 1)
    return model


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """From here on Triton serves, in its interpreter, and passes can be captured.

    So many programs run at a time that few rows with more than 32 positions are split.
    """
    monkeypatch.setattr(ops, "backend", lambda x: "triton")
    monkeypatch.setattr(graphs, "can_capture", lambda model: True)
    monkeypatch.setattr(attention_paged, "resident_programs", lambda x: 64)
    monkeypatch.setattr(attention_paged, "MIN_SPLIT", 32)
    return Cuda(monkeypatch)


def attach_numbers(model, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in attach(model, LoRAConfig(), name).parameters():
        parameter.data.normal_(0, 0.3, generator=generator)


def ask(name: str, num_prompt: int, max_tokens: int, adapter: str | None) -> Request:
    prompt = tuple((7 * i + num_prompt) % 300 for i in range(num_prompt))
    return Request(name, prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), adapter)


def texts(sampler: Sampler, requests: list[Request]) -> list[list[int]]:
    return [completion.token_ids for completion in sampler.generate(requests)]


def train(model) -> None:
    with torch.no_grad():
        for pair in model.adapters["one"].pairs.values():
            pair.lora_B.mul_(-2)


def a_pass(product: str, is_split: bool) -> Counter:
    """What a pass launches: of a layer 13, or 14 with the joining of splits, and 6 around them."""
    per_layer = {product: 7, "_rms_norm_kernel": 2, "add": 1, "_attention_paged_join_kernel": int(is_split)}
    per_layer |= dict.fromkeys(("_write_kv_rope_kernel", "_attention_paged_kernel", "_swiglu_kernel"), 1)
    around = ("embedding", "to", "mul", "cos", "sin", "_rms_norm_kernel")
    return Counter({name: NUM_LAYERS * n for name, n in per_layer.items() if n}) + Counter(around)


def test_rows_and_contexts_change(model, tokenizer, request):
    # five rows, then three, two and one; the first one's context passes 64, and so two splits become four
    lens = [("a", 61, 7), ("b", 3, 3), ("c", 5, 6), ("d", 1, 3), ("e", 2, 5)]
    shrinking = [ask(*each, "one") for each in lens]
    # three rows again, in other blocks, with contexts up to 97: as many splits, of which two and more are empty
    again = [ask(*each, "one") for each in [("f", 95, 3), ("g", 4, 3), ("h", 1, 3)]]
    sampler = Sampler(model, tokenizer, CFG)
    expected = texts(sampler, shrinking), texts(sampler, again)

    cuda = request.getfixturevalue("cuda")
    sampler = Sampler(model, tokenizer, CFG)
    assert texts(sampler, shrinking) == expected[0]
    assert len(cuda.captured) == 5  # (rows, splits): (8, 2), (4, 2), (4, 4), (2, 4), (1, 4)
    assert cuda.num_replays == sampler.stats.num_steps - 1 == 6  # all but the prompts' step
    assert texts(sampler, again) == expected[1]
    assert len(cuda.captured) == 5 and cuda.num_replays == 8
    assert cuda.captured[0] == a_pass("_lora_product_kernel", is_split=True)
    sampler.close()
    assert not cuda.alive


def test_adapters_change(model, tokenizer, request):
    base = [ask("a", 3, 4, None), ask("b", 2, 4, None)]
    adapted = [replace(each, adapter="one") for each in base]
    mixed = [adapted[0], replace(base[1], adapter="two")]
    sampler = Sampler(model, tokenizer, CFG)
    expected = [texts(sampler, requests) for requests in (base, adapted, mixed)]
    train(model)
    expected.append(texts(sampler, adapted))
    assert expected[3] != expected[1] != expected[0]

    with torch.no_grad():  # as it was before
        for pair in model.adapters["one"].pairs.values():
            pair.lora_B.mul_(-0.5)
    cuda = request.getfixturevalue("cuda")
    sampler = Sampler(model, tokenizer, CFG)
    assert texts(sampler, base) == expected[0]
    assert texts(sampler, adapted) == expected[1]
    assert (len(cuda.captured), cuda.num_replays) == (2, 6)
    for pair in model.adapters["one"].pairs.values():
        pair.cast(torch.float64)  # somebody asks for other copies, and these are dropped
    assert texts(sampler, adapted) == expected[1]
    assert (len(cuda.captured), cuda.num_replays) == (2, 9)
    assert texts(sampler, mixed) == expected[2]
    assert (len(cuda.captured), cuda.num_replays) == (2, 9)  # no graph has two adapters
    train(model)
    assert texts(sampler, adapted) == expected[3]
    assert (len(cuda.captured), cuda.num_replays) == (3, 12)
    assert len(cuda.alive) == 1  # the old version's is gone, and the base's with it
    assert texts(sampler, base) == expected[0]
    assert (len(cuda.captured), cuda.num_replays) == (4, 15)
    assert cuda.captured[0] == a_pass("linear", is_split=False)


def test_another_adapter_takes_the_name(model, tokenizer, request):
    asked = [ask("a", 40, 4, "one")]  # two blocks are full: what the cache finds again
    expected = []
    for seed in (5, 6):
        detach(model, "one")
        attach_numbers(model, "one", seed)
        expected.append(texts(Sampler(model, tokenizer, CFG), asked))
    assert expected[0] != expected[1]

    cuda = request.getfixturevalue("cuda")
    sampler = Sampler(model, tokenizer, CFG)
    for seed in (5, 6):
        detach(model, "one")
        attach_numbers(model, "one", seed)
        assert texts(sampler, asked) == expected[seed - 5]
    assert sampler.stats.num_cached_tokens == 0
    assert (len(cuda.captured), len(cuda.alive)) == (2, 1)


def test_a_capture_that_fails(model, tokenizer, request, monkeypatch):
    few, more = ([ask(name, 3, 4, None) for name in names] for names in ("a", "bc"))
    sampler = Sampler(model, tokenizer, CFG)
    expected = texts(sampler, few), texts(sampler, more)
    cuda = request.getfixturevalue("cuda")
    sampler = Sampler(model, tokenizer, CFG)
    assert texts(sampler, few) == expected[0]

    def full(gate, up):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("full")
        return swiglu(gate, up)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "swiglu", full)
        with pytest.raises(torch.OutOfMemoryError) as kept:  # what it holds may outlive the next capture
            texts(sampler, more)
    assert cuda.current is None and not cuda.alive
    assert texts(sampler, more) == expected[1]
    del kept
    gc.collect()
    assert texts(sampler, few) == expected[0]
    assert texts(sampler, more) == expected[1]


def test_nothing_outlives_a_sampler(model, tokenizer):
    """Nor does it wait for the garbage collector: an iteration's sampler is made where the last one's cache was."""
    gc.collect()
    gc.disable()
    try:
        sampler = Sampler(model, tokenizer, CFG)
        texts(sampler, [ask("a", 3, 2, None)])
        cache, pools = (weakref.ref(held) for held in (sampler._passes.cache, sampler._pools))
        sampler.close()
        assert cache() is None and pools() is None
        sampler.abort()  # late
        sampler = Sampler(model, tokenizer, CFG)
        cache, pools = (weakref.ref(held) for held in (sampler._passes.cache, sampler._pools))
        del sampler
        assert cache() is None and pools() is None
    finally:
        gc.enable()


def test_the_flag_and_the_rows_that_no_graph_has(model, tokenizer, request):
    requests = [ask(name, 2, 2, None) for name in "abc"]
    expected = texts(Sampler(model, tokenizer, CFG), requests)
    cuda = request.getfixturevalue("cuda")
    assert texts(Sampler(model, tokenizer, replace(CFG, cuda_graphs=False)), requests) == expected
    assert cuda.num_replays == 0


def test_padded_rows():
    padded = {n: padded_rows(n) for n in range(1, 65)}
    assert sorted(set(padded.values())) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert all(0 <= rows - n <= 7 for n, rows in padded.items())


# ---- the fake itself -----------------------------------------------------------------------------------------------


def test_the_fake_replays_on_the_same_tensors_with_the_same_numbers(cuda: Cuda):
    x, number = torch.ones(3), 2
    swiglu(x[None], x[None])
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        y = swiglu((x * number)[None], x[None])
    with torch.cuda.graph(second, first.pool()):
        z = x + 1
    assert y.isnan().all()  # nothing was computed
    x.fill_(3.0)
    number = 7
    first.replay()
    assert torch.equal(y, swiglu(torch.full((1, 3), 6.0), x[None]))
    second.replay()
    assert y.isnan().all() and torch.equal(z, torch.full((3,), 4.0))
    del second
    with pytest.raises(AssertionError, match="dropped"):
        first.replay()


def test_the_fake_keeps_nothing_alive_that_it_did_not_make(cuda: Cuda):
    x, graph = torch.ones(3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x[1:] + 1
        z = y + 1
    graph.replay()
    assert z.tolist() == [3, 3]
    del x, y
    with pytest.raises(AssertionError, match="gone"):
        graph.replay()


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x[x > 0],
        lambda x: bool(x[0]),
        lambda x: swiglu(x[None], x[None]),  # not compiled yet
    ],
    ids=["item", "tolist", "tensor", "mask", "bool", "compile"],
)
def test_the_fake_refuses(cuda: Cuda, forbidden):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="while capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden(x)
