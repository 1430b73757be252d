"""What the ranks say to each other, counted call by call below our code, against the formulas of plan.py."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo  # the first optimizer imports it, for seconds: here once, and not in every forked rank
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isheep.config import RunConfig, TrainConfig
from isheep.mesh import Mesh
from isheep.model import parallel
from isheep.model.config import ModelConfig
from isheep.model.lora import Adapter, LoRAConfig, attach
from isheep.model.sizes import Collective, Sizes, parameter_shapes
from isheep.model.transformer import Transformer
from isheep.sampler import vocab_parallel
from isheep.train.data import Example
from isheep.train.trainer import Trainer
from tests.gloo import run_ranks
from tests.paging import paged_batch, scattered_blocks
from tests.tiny import config_json

Traffic = Counter[tuple[str, int, int]]  # (kind, bytes, ranks) -> how often

MESHES = [(2, 1), (4, 1), (2, 2), (1, 2)]  # shard, replicate
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mha, biases": ("qwen2_mha", {"num_attention_heads": 8, "num_key_value_heads": 8}),
    "gqa, tied": ("qwen2_gqa_tied", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "out biases, heads divide by 2 alone": ("llama_linear_rope_bias", {}),
    "fewer kv heads than ranks": ("llama_gqa", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "heads do not divide": ("qwen3_head_dim", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "nothing divides": ("llama_gqa", {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 81,
                                      "vocab_size": 321}),
}  # fmt: skip
LAYERS = 2
PROMPTS = (1, 5, 33, 20)
TRAIN = TrainConfig(r=2, batch_size=8, micro_batch_tokens=10, dropout=0.1, epochs=1.0)
NUM_MICRO = 2  # of a rank, whose rows are 8 / ranks, each of 6 tokens


def config_of(shape: str) -> ModelConfig:
    name, changes = SHAPES[shape]
    return ModelConfig.from_dict(config_json(name, num_hidden_layers=LAYERS, **changes))


KINDS = {"allreduce_": "all-reduce", "allgather_": "all-gather", "_allgather_base_": "all-gather"}


class Calls(TorchDispatchMode):
    """Notes every call that reaches torch's collectives inside it, whoever makes it, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Traffic = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            results = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg))
            ranks = dist.ProcessGroup.unbox(group).size()
            self.seen[KINDS.get(name, name), sum(x.nbytes for x in results), ranks] += 1
        return func(*args, **(kwargs or {}))


def formula(collectives: list[Collective]) -> Traffic:
    found: Traffic = Counter()
    for c in collectives:
        found[c.kind, c.bytes, c.ranks] += c.count
    return found


def count(mesh: Mesh) -> dict[str, dict[str, Traffic]]:
    """Of every shape: a prefill, a decode step, a draw of each kind, an optimizer step and a scoring pass."""
    found = {}
    for shape in SHAPES:
        model = sharded(config_of(shape), mesh)
        adapter = attach(model, LoRAConfig(TRAIN.r, dropout=TRAIN.dropout), "a")
        found[shape] = count_sampling(parallel.sampling_view(model, mesh)) | count_training(model, adapter, mesh)
    return found


def sharded(config: ModelConfig, mesh: Mesh) -> Transformer:
    """Random bf16 weights, placed as a loaded model's are."""
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    if mesh.shard > 1:
        parallel.shard_for_training(model, mesh)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parallel.local(parameter).normal_(0, 0.1)
    return model


def count_sampling(view: Transformer) -> dict[str, Traffic]:
    blocks = scattered_blocks([n + 1 for n in PROMPTS], 16, 30)
    prompts = paged_batch([([7] * n, 0) for n in PROMPTS], blocks, 16).with_adapter("a")
    tokens = paged_batch([([7], n) for n in PROMPTS], blocks, 16).with_adapter("a")
    cache, found = view.new_kv_cache(30, 16), {}
    with torch.inference_mode():
        with Calls() as calls:
            view.logits(view(prompts, cache)[:4])
        found["prefill"] = calls.seen
        with Calls() as calls:
            logits = view.logits(view(tokens, cache))
        found["decode"] = calls.seen
        for name, top_k, top_p in (("plain draw", 0, 1.0), ("top-k", 5, 1.0), ("top-p", 0, 0.9)):
            with Calls() as calls:
                draw(view, logits, top_k, top_p)
            found[name] = calls.seen
    return found


def draw(view: Transformer, logits: Tensor, top_k: int, top_p: float) -> None:
    if view.vocab is not None:
        n = len(logits)
        settings = (torch.ones(n), torch.full((n,), top_k), torch.full((n,), top_p), torch.zeros(n), torch.rand(n))
        vocab_parallel.sample(logits, logits, *settings, view.vocab)


def count_training(model: Transformer, adapter: Adapter, mesh: Mesh) -> dict[str, Traffic]:
    rows = [Example((7,) * 6, 2)] * (NUM_MICRO * mesh.size)
    trainer = Trainer(model, adapter, rows, rows, TRAIN, 0, mesh)
    with trainer.training(), Calls() as training:
        trainer.step(trainer.steps[0])
    with Calls() as scoring:
        trainer.evaluate()
    return {"train": training.seen, "score": scoring.seen}


@pytest.fixture(scope="module", params=MESHES, ids=lambda mesh: f"{mesh[0]}x{mesh[1]}")
def counted(request: pytest.FixtureRequest) -> tuple[int, int, list[dict[str, dict[str, Traffic]]]]:
    """(shard, replicate, what each rank counted): one start of the ranks for all shapes."""
    shard, replicate = request.param
    return shard, replicate, run_ranks(count, shard, replicate)


def sizes(shape: str, shard: int, replicate: int) -> Sizes:
    config, cfg = config_of(shape), RunConfig(model="tiny", out="none", iterations=1, train=TRAIN)
    return Sizes(config, cfg, parameter_shapes(config), shard, replicate)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling(counted: Any, shape: str) -> None:
    """Every sum of the formula on every rank, and nothing else: no weight is gathered."""
    shard, replicate, ranks = counted
    s = sizes(shape, shard, replicate)
    for rank in ranks:
        assert rank[shape]["prefill"] == formula(s.sampling_traffic(sum(PROMPTS)))
        assert rank[shape]["decode"] == formula(s.sampling_traffic(len(PROMPTS)))
        if shard > 1 and shape in ("mha, biases", "gqa, tied", "fewer kv heads than ranks"):
            row = s.config.hidden_size * 2
            assert rank[shape]["decode"] == {("all-reduce", len(PROMPTS) * row, shard): 1 + 2 * LAYERS}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_draw(counted: Any, shape: str) -> None:
    """As vocab_parallel.py says: so many calls, of so many bytes a row handed in, whatever the vocabulary."""
    shard, _, ranks = counted
    said = {"plain draw": (3, 48), "top-k": (9, 48 + 2584), "top-p": (10, 48 + 2592)}
    for rank in ranks:
        for name, (calls, nbytes) in said.items():
            seen = rank[shape][name]
            handed = sum(n * size // (shard if kind == "all-gather" else 1) for (kind, size, _), n in seen.items())
            assert (seen.total(), handed) == ((calls, nbytes * len(PROMPTS)) if shard > 1 else (0, 0))
            assert {(kind, group) for kind, _, group in seen} <= {("all-reduce", shard), ("all-gather", shard)}


@pytest.mark.parametrize("shape", SHAPES)
def test_training(counted: Any, shape: str) -> None:
    """Each layer gathered twice a micro-batch, the two tables once, one sum a step: nothing is reduce-scattered."""
    shard, replicate, ranks = counted
    s = sizes(shape, shard, replicate)
    for rank in ranks:
        assert rank[shape]["train"] == formula(s.training_traffic(NUM_MICRO))


@pytest.mark.parametrize("shape", SHAPES)
def test_scoring(counted: Any, shape: str) -> None:
    """The gathers of a forward alone: half of those of the layers. At the end the ranks add up one number."""
    shard, replicate, ranks = counted
    gathers = [c for c in sizes(shape, shard, replicate).training_traffic(NUM_MICRO) if c.kind == "all-gather"]
    forward = [replace(c, count=c.count // 2) if c.what == "layers" else c for c in gathers]
    loss = Collective("all-reduce", "loss", 1, 8, shard * replicate)
    for rank in ranks:
        assert rank[shape]["score"] == formula([*forward, loss])
