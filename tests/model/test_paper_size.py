"""The paper's 72B and the 70B of Llama 3 on eight ranks, without their bytes: one rank of a group that only pretends to
talk, tensors that have shapes and nothing else. What runs is the code that runs on GPUs, kernels apart."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from isheep.config import RunConfig, model_preset
from isheep.mesh import Mesh
from isheep.model import ops, parallel
from isheep.model.batch import PackedBatch
from isheep.model.config import ModelConfig
from isheep.model.lora import LoRAConfig, attach
from isheep.model.sizes import Sizes, parameter_shapes
from isheep.model.transformer import Transformer
from tests.model.test_traffic import Calls, formula
from tests.paging import paged_batch, scattered_blocks

SHARD = 8
PARAMETERS = {"qwen1.5-72b": 72_287_920_128, "llama-3-70b": 70_553_706_496}  # as the checkpoints' indices have them
KV_HEADS = {"qwen1.5-72b": 8, "llama-3-70b": 1}  # of 64 and of 8, on each rank
# by hand, from DESIGN §1.3: the dimension that is cut
CUT = {**dict.fromkeys("embed_tokens lm_head q_proj k_proj v_proj gate_proj up_proj".split(), 0),
       "o_proj": 1, "down_proj": 1}  # fmt: skip
C, INNER, HEAD_DIM = 8192, {"qwen1.5-72b": 24576, "llama-3-70b": 28672}, 128
NUM_BLOCKS, BLOCK = 40, 16

each_model = pytest.mark.parametrize("name", PARAMETERS)
first_and_last_rank = pytest.mark.parametrize("mesh", [0, SHARD - 1], indirect=True, ids=["rank 0", "rank 7"])


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """One rank's mesh; the other seven do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=SHARD)
    try:
        devices = init_device_mesh("cpu", (1, SHARD), mesh_dim_names=("replicate", "shard"))
        yield Mesh(SHARD, 1, request.param, devices)
    finally:
        dist.destroy_process_group()


def config_of(name: str, layers: int = 80) -> ModelConfig:
    preset = model_preset(name)
    assert preset is not None
    config = ModelConfig.from_dict(preset.architecture)
    assert config.num_hidden_layers == 80
    return replace(config, num_hidden_layers=layers)


def sharded(config: ModelConfig, mesh: Mesh) -> Transformer:
    """On the meta device, as weights.load_model has it before it reads the weights."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    parallel.shard_for_training(model, mesh)
    return model


def sizes(config: ModelConfig) -> Sizes:
    return Sizes(config, RunConfig(model="72b", out="none", iterations=1), parameter_shapes(config), SHARD, 1)


# ---- where every byte is --------------------------------------------------------------------------------------------


@first_and_last_rank
@each_model
def test_every_parameter_of_80_layers_is_cut_in_eight(name: str, mesh: Mesh) -> None:
    config = config_of(name)
    model = sharded(config, mesh)
    held = 0
    for path, p in model.named_parameters():
        dim, shape = CUT.get(path.split(".")[-2]), list(p.shape)
        if dim is None:
            assert "norm" in path and not isinstance(p, DTensor)
        else:
            assert isinstance(p, DTensor) and p.placements == (Replicate(), Shard(dim))
            shape[dim] //= SHARD
        assert parallel.local(p).shape == tuple(shape), path
        assert p.dtype == torch.bfloat16 and not p.requires_grad
        held += parallel.local(p).nbytes
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert held == sizes(config).training()["weights"]
    assert held == pytest.approx(PARAMETERS[name] * 2 / SHARD, rel=2e-4)  # the norms are whole: 2.6 MB of 18 GB


# ---- a step of each view --------------------------------------------------------------------------------------------


class Numbers(list[int]):
    """What torch's attention asks for as a list: a tensor without bytes has no numbers to give."""

    def tolist(self) -> list[int]:
        return list(self)


def paged(lens: list[int], first: int) -> PackedBatch:
    """Tokens `first` .. `first` + n of each sequence."""
    after = [first + n for n in lens]
    batch = paged_batch([([7] * n, first) for n in lens], scattered_blocks(after, BLOCK, NUM_BLOCKS), BLOCK)
    assert batch.paged is not None
    where = replace(batch.paged, context_lens=Numbers(after))  # type: ignore[arg-type]
    lens_so_far: Any = Numbers([0, *accumulate(lens)])
    return replace(batch, cu_seqlens=lens_so_far, paged=where).with_adapter("a")


class AllCounted(TorchDispatchMode):
    """Answers what the loss asks its targets: all are counted, none is out of bounds of the vocabulary."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(len(args[0]), 1, dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        return func(*args, **(kwargs or {}))


@first_and_last_rank
@each_model
def test_sampling_with_all_80_layers(name: str, mesh: Mesh) -> None:
    """A prefill and a decode step of two sequences, through the adapter."""
    model = sharded(config_of(name), mesh)
    attach(model, LoRAConfig(), "a")
    config, view, s = model.config, parallel.sampling_view(model, mesh), sizes(model.config)
    assert view.vocab is not None and view.vocab.first == mesh.rank * config.vocab_size // SHARD
    q, kv, inner = C // SHARD, KV_HEADS[name] * HEAD_DIM, INNER[name] // SHARD
    wanted = {"q_proj": (q, C), "k_proj": (kv, C), "v_proj": (kv, C), "o_proj": (C, q),
              "gate_proj": (inner, C), "up_proj": (inner, C), "down_proj": (C, inner)}  # fmt: skip
    for path, pair in view.adapters["a"].pairs.items():
        out_features, in_features = wanted[path.rpartition(".")[2]]
        assert view.get_submodule(path).weight.shape == (out_features, in_features)
        assert (pair.lora_A.shape, pair.lora_B.shape) == ((8, in_features), (out_features, 8))

    with torch.device("meta"), torch.inference_mode():
        cache = view.new_kv_cache(NUM_BLOCKS, BLOCK)
        assert cache.k.shape == cache.v.shape == (80, NUM_BLOCKS, BLOCK, KV_HEADS[name], HEAD_DIM)
        assert cache.k.nbytes + cache.v.nbytes == NUM_BLOCKS * BLOCK * s.kv_token_bytes
        for batch in (paged([200, 56], 0), paged([1, 1], 200)):
            with Calls() as calls:
                hidden = view(batch, cache)
                logits = view.logits(hidden)
            assert hidden.shape == (batch.num_tokens, C) and hidden.dtype == torch.bfloat16
            assert logits.shape == (batch.num_tokens, config.vocab_size // SHARD)
            assert calls.seen == {("all-reduce", batch.num_tokens * C * 2, SHARD): 1 + 2 * 80}
            assert calls.seen == formula(s.sampling_traffic(batch.num_tokens))


def check_training(name: str, layers: int, mesh: Mesh) -> None:
    """A micro-batch of two rows, 4096 tokens, forward and backward, the layers computed again."""
    model = sharded(config_of(name, layers), mesh)
    with FakeTensorMode(allow_non_fake_inputs=True):  # FSDP takes no parameters on the meta device
        model.to_empty(device="cpu")
        before = {path: parallel.local(p).shape for path, p in model.named_parameters()}
        parameters = list(attach(model, LoRAConfig(), "a").parameters())
        model.gradient_checkpointing = True
        batch = PackedBatch.pack([[7] * 3000, [7] * 1096], "cpu", "a")
        with Calls() as calls, AllCounted():
            hidden = model(batch)
            nll = model.nll(hidden, batch.input_ids)
            nll.sum().backward()
    assert ops.backend(hidden) == "torch", "the C++ kernels want an address, and a fake tensor has none"
    assert hidden.shape == (4096, C) and hidden.dtype == torch.bfloat16
    assert nll.shape == (4096,) and nll.dtype == torch.float32
    assert len(parameters) == 2 * 7 * layers
    assert sum(p.numel() for p in parameters) == sizes(model.config).adapter_params
    for p in parameters:
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.dtype == torch.float32
    after = {path: parallel.local(p).shape for path, p in model.named_parameters() if ".lora." not in path}
    assert after == before, "what was gathered is freed"

    gathers = [c for c in sizes(model.config).training_traffic(1) if c.kind == "all-gather"]
    assert calls.seen == formula(gathers)
    kv = KV_HEADS[name] * SHARD * HEAD_DIM
    layer = 2 * C * C + 2 * kv * C + 3 * C * INNER[name] + (C + 2 * kv if model.config.qkv_bias else 0)
    table = model.config.vocab_size * C
    assert calls.seen == {("all-gather", 2 * layer, SHARD): 2 * layers, ("all-gather", 2 * table, SHARD): 2}


@first_and_last_rank
@each_model
def test_training_with_3_of_the_layers(name: str, mesh: Mesh) -> None:
    check_training(name, 3, mesh)


@pytest.mark.parametrize("mesh", [SHARD - 1], indirect=True, ids=["rank 7"])
def test_training_with_all_80_layers_of_the_72b(mesh: Mesh) -> None:
    check_training("qwen1.5-72b", 80, mesh)
