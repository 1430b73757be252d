"""Memory and traffic of a plan, against tensors that are cut, cast and counted one by one."""

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isheep import plan as plan_module
from isheep.cli import run_main
from isheep.config import RunConfig, UserError, load_config, model_preset, model_presets
from isheep.mesh import Mesh
from isheep.model.batch import PackedBatch
from isheep.model.config import ModelConfig
from isheep.model.lora import LoRAConfig, attach
from isheep.model.parallel import local_config
from isheep.model.sizes import Sizes, parameter_shapes
from isheep.model.transformer import KVCache, Transformer
from isheep.plan import GIB, Plan, choose
from isheep_kernels.linear_cross_entropy import linear_cross_entropy
from isheep_kernels.sampling import sample_ref
from tests.tiny import config_json

PARAMETERS = {  # as the checkpoints' own model cards and indices have them
    "llama-3-8b": 8_030_261_248,
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-72b": 72_287_920_128,
    "smollm2-135m": 134_515_008,
}


def preset_config(name: str, **changes: Any) -> ModelConfig:
    preset = model_preset(name)
    assert preset is not None
    return replace(ModelConfig.from_dict(preset.architecture), **changes)


def run_config(name: str = "tiny", *overrides: str, **values: Any) -> RunConfig:
    return load_config(RunConfig, {"model": name, "out": "runs/x", "iterations": 3, **values}, overrides=overrides)


def sizes(config: ModelConfig, shard: int = 1, *overrides: str, replicate: int = 1) -> Sizes:
    return Sizes(config, run_config("tiny", *overrides), parameter_shapes(config), shard, replicate)


def tiny(**changes: Any) -> ModelConfig:
    """24 heads of 16, 6 key/value heads: divisible by 1, 2, 3 and 6 ranks; 12 give each half a key/value head."""
    shape = {"num_attention_heads": 24, "num_key_value_heads": 6, "head_dim": 16, "hidden_size": 384}
    return ModelConfig.from_dict(
        config_json("llama_linear_rope_bias", **{**shape, "intermediate_size": 720, **changes})
    )


def preset_plan(name: str, num_devices: int, gib: float, *overrides: str, **mesh: Any) -> Plan:
    preset = model_preset(name)
    assert preset is not None
    cfg = run_config(name, *overrides, iterations=preset.iterations)
    return choose(preset_config(name), cfg, num_devices, int(gib * GIB), **mesh)


# ---- weights, adapters, cache: tensors cut as the ranks hold them ---------------------------------------------------


@pytest.mark.parametrize("name", model_presets())
def test_one_gpu_holds_every_parameter(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(preset_config(name)).to(torch.bfloat16)
    plan = sizes(preset_config(name)).training()
    assert plan["weights"] == sum(p.nbytes for p in model.parameters())
    assert plan["gathered weights"] == 0
    if name in PARAMETERS:
        assert plan["weights"] == 2 * PARAMETERS[name]


def test_every_published_size_is_one_of_the_presets() -> None:
    assert PARAMETERS.keys() <= model_presets().keys()


def cut_by_hand(model: Transformer, shard: int) -> int:
    """Bytes of rank 0's parts, cut by torch.chunk: written against DESIGN §1.3, not against parallel.py."""
    c = model.config
    heads_divide = c.num_attention_heads % shard == 0 and (
        c.num_key_value_heads % shard == 0 or shard % c.num_key_value_heads == 0
    )
    columns = {"embed_tokens", "lm_head"}
    if heads_divide:
        columns |= {"q_proj"} | ({"k_proj", "v_proj"} if c.num_key_value_heads % shard == 0 else set())
    rows = {"o_proj"} if heads_divide else set()
    if c.intermediate_size % shard == 0:
        columns, rows = columns | {"gate_proj", "up_proj"}, rows | {"down_proj"}
    total = 0
    for name, p in model.named_parameters():
        module, leaf = name.split(".")[-2:]
        if module in columns:
            p = p.chunk(shard, 0)[0]
        elif module in rows and leaf == "weight":
            p = p.chunk(shard, 1)[0]
        total += p.numel() * p.element_size()
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [2, 3, 4, 5, 6, 7, 12, 16])
def test_a_rank_holds_its_part_of_the_weights(shard: int, tied: bool) -> None:
    """4: no even split of the key/value heads; 5: of the query heads; 7, 16: of neither heads nor MLP or vocabulary."""
    config = tiny(tie_word_embeddings=tied)
    assert sizes(config, shard).training()["weights"] == cut_by_hand(Transformer(config).bfloat16(), shard)


def adapter_bytes(model: Transformer, r: int) -> int:
    adapter = attach(model, LoRAConfig(r=r), "a")
    return sum(p.nbytes for p in adapter.parameters())


def test_adapters_and_optimizer_are_whole_on_every_rank() -> None:
    config = tiny()
    one = adapter_bytes(Transformer(config), 5)
    for shard in (1, 2, 4, 12):
        plan = sizes(config, shard, "train.r=5", "iterations=4").training()
        assert plan["adapters"] == 4 * one
        model = Transformer(config)
        parameters = list(attach(model, LoRAConfig(r=5), "a").parameters())
        optimizer = torch.optim.AdamW(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
        assert plan["gradients, AdamW"] == one + moments


@pytest.mark.parametrize(("shard", "split"), [(1, ""), (2, "qkvogud"), (12, "qogud"), (5, "gud"), (7, "")])
def test_casts_of_the_adapters(shard: int, split: str) -> None:
    """A whole copy for scoring; to sample, B's rows follow a cut along dim 0 and A's columns one along dim 1."""
    config = tiny()
    adapter = attach(Transformer(config), LoRAConfig(r=2), "a")
    whole = sliced = 0
    for path, pair in adapter.pairs.items():
        letter, a, b = path.rpartition(".")[2][0], pair.lora_A.bfloat16(), pair.lora_B.bfloat16()
        whole += a.nbytes + b.nbytes
        if letter in split and letter in "od":
            a = a.chunk(shard, 1)[0].clone()
        elif letter in split:
            b = b.chunk(shard, 0)[0].clone()
        elif shard == 12 and letter in "kv":
            b = b[: config.head_dim].clone()  # the one head it serves
        sliced += a.nbytes + b.nbytes
    plan = sizes(config, shard, "train.r=2", "iterations=1").sampling(GIB)
    assert plan["adapters' casts"] == (whole if shard == 1 else whole + sliced)


def test_only_targets_have_adapters() -> None:
    config = tiny()
    both = sizes(config, 1, 'train.target_modules=["q_proj", "down_proj"]')
    layers, r = config.num_hidden_layers, both.cfg.train.r
    assert both.adapter_params == layers * r * ((384 + 24 * 16) + (720 + 384))


@pytest.mark.parametrize(("shard", "heads"), [(1, 6), (2, 3), (6, 1), (12, 1), (4, 6), (5, 6)])
def test_the_cache_holds_the_heads_that_a_rank_serves(shard: int, heads: int) -> None:
    config = tiny()
    s = sizes(config, shard, "sampler.block_size=32", "sampler.kv_cache_gib=0.001")
    cache = KVCache(torch.empty(0, dtype=torch.bfloat16), replace(config, num_key_value_heads=heads), 3, 32)
    assert s.kv_token_bytes * 3 * 32 == cache.k.nbytes + cache.v.nbytes
    assert s.local.num_key_value_heads == heads
    block = 32 * s.kv_token_bytes
    assert s.sampling(GIB)["KV cache"] == int(0.001 * GIB) // block * block


def test_the_cache_takes_the_rest_up_to_every_whole_context() -> None:
    config = tiny()
    s = sizes(config, 2)
    others = s.sampling(0).bytes
    assert s.sampling(0)["KV cache"] == 0
    room = 20 * 16 * s.kv_token_bytes
    assert s.sampling(others + room)["KV cache"] == room
    assert s.sampling(others + room + 16 * s.kv_token_bytes - 1)["KV cache"] == room
    contexts = s.cfg.sampler.max_num_seqs * config.context_len
    assert s.sampling(others + 100 * GIB)["KV cache"] == contexts * s.kv_token_bytes


# ---- activations: what torch allocates, on the meta device ----------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), count=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, count=True)
        return out

    def _meet(self, tree: Any, count: bool) -> None:
        for tensor in tree_leaves(tree):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.bytes:
                self.bytes[storage._cdata] = storage.nbytes() if count else 0
                self.now += self.bytes[storage._cdata]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def peak_of(work: Callable[[], object]) -> int:
    with Live() as live:
        work()
    return live.peak


class Flash(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its result and an fp32 sum for each head and token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:2], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device torch's attention is the unfused one, which no GPU takes."""

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> Tensor:
        return torch.cat([Flash.apply(q, k, v)])  # packed, as the reference does with its sequences

    monkeypatch.setattr("isheep_kernels.attention_packed.attention_packed_ref", attention)


SHAPES = {
    "72b": lambda: preset_config("qwen1.5-72b", num_hidden_layers=3),
    "70b": lambda: preset_config("llama-3-70b", num_hidden_layers=3),
    "0.5b": lambda: preset_config("qwen1.5-0.5b", num_hidden_layers=6),
    "qk_norm": lambda: preset_config("qwen1.5-0.5b", num_hidden_layers=3, qk_norm=True),
}


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dropout", [0.05, 0.0])
@pytest.mark.parametrize(("shape", "dtype"), [*((shape, torch.bfloat16) for shape in SHAPES), ("0.5b", torch.float32)])
def test_a_pass_allocates_what_is_planned(shape: str, dropout: float, checkpointing: bool, dtype: torch.dtype) -> None:
    config, tokens = SHAPES[shape](), 2048
    name = str(dtype).removeprefix("torch.")
    flags = (f"gradient_checkpointing={str(checkpointing).lower()}", f"dropout={dropout}", "r=1")
    overrides = (*(f"train.{flag}" for flag in flags), f"train.micro_batch_tokens={tokens}", f"dtype={name}")
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        adapter = attach(model, LoRAConfig(r=1, dropout=dropout), "a")
        batch = PackedBatch.pack([[0] * 256] * (tokens // 256), torch.device("meta"), "a")
        if dropout:
            adapter.set_dropout(1, torch.zeros(tokens, dtype=torch.int64))
    model.gradient_checkpointing = checkpointing
    gradient = torch.empty(tokens, config.hidden_size, dtype=dtype, device="meta")
    peak = peak_of(lambda: model(batch).backward(gradient))
    s = sizes(config, 1, *overrides)
    planned = s._for_backward().bytes + s._layer_backward().bytes
    assert 0.88 < peak / planned < 1.01


@pytest.mark.parametrize("shard", [1, 3, 8])  # 3: the heads stay whole, and rope takes more than the MLP
@pytest.mark.parametrize("shape", ["72b", "70b", "0.5b"])
def test_sampling_allocates_what_is_planned(shape: str, shard: int) -> None:
    config, tokens = SHAPES[shape](), 1024
    with torch.device("meta"):
        model = Transformer(local_config(config, Mesh(shard, 1))).bfloat16()
        batch = PackedBatch.pack([[0] * 16] * (tokens // 16), torch.device("meta"), None)
    with torch.inference_mode():
        peak = peak_of(lambda: model(batch))
    planned = sizes(config, shard, f"sampler.max_num_batched_tokens={tokens}").sampling(GIB)["at work"]
    assert 0.9 < peak / planned < 1.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_allocates_what_is_planned(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's own operators take, as on a GPU: the C++ kernel of the CPU needs less."""
    monkeypatch.setattr("isheep_kernels.cpu.serves", lambda x: False)
    config, tokens, chunk = tiny(vocab_size=4096, hidden_size=64), 256, 96
    hidden = torch.randn(tokens, 64, dtype=torch.float32).to(dtype).requires_grad_()
    weight, targets = torch.randn(4096, 64).to(dtype), torch.randint(0, 4096, (tokens,))
    peak = peak_of(lambda: linear_cross_entropy(hidden, weight, targets, chunk).sum().backward())
    s = sizes(config, 1, f"train.micro_batch_tokens={tokens}", f"train.loss_chunk_tokens={chunk}", "train.cutoff=64")
    norm_and_hidden = tokens * 64 * (4 + 2)  # alive through the loss, but made before it
    assert 0.97 < (peak + norm_and_hidden) / s._loss().bytes < 1.02


def test_the_draw_allocates_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rows = tiny(vocab_size=8192), 16
    like = {"dtype": torch.float32}
    columns = (torch.ones(rows, **like), torch.zeros(rows, dtype=torch.int32), torch.full((rows,), 0.9, **like))
    columns += (torch.zeros(rows, **like), torch.rand(rows, dtype=torch.float64))
    logits = torch.randn(rows, 8192).half()
    peak = peak_of(lambda: sample_ref(logits, *columns)) + logits.nbytes
    planned = sizes(config, 1, f"sampler.max_num_seqs={rows}").sampling(GIB)["logits and draw"]
    assert 0.95 < peak / planned <= 1


# ---- what is gathered, and what is moved ----------------------------------------------------------------------------


def test_gathered_layers_are_counted_by_hand() -> None:
    config = tiny(mlp_bias=False, attention_bias=False)
    attention, mlp = 384 * (24 + 6 + 6 + 24) * 16, 3 * 384 * 720
    columns = 24 * 16 * 384 + 720 * 384
    assert sizes(config, 2)._gathered_layers().bytes == 2 * (3 * (attention + mlp) + columns)
    without_kv = attention - 2 * 384 * 6 * 16
    assert sizes(config, 12)._gathered_layers().bytes == 2 * (3 * (without_kv + mlp) + columns)
    assert sizes(config, 5)._gathered_layers().bytes == 2 * (3 * mlp + 720 * 384)
    assert sizes(config, 7)._gathered_layers().bytes == 0
    assert sizes(config, 7)._gathered_head().bytes == 2 * 2 * 322 * 384  # 46 rows from each


def traffic(collectives: list) -> dict[str, tuple[str, int, int, int]]:
    return {c.what: (c.kind, c.count, c.bytes, c.ranks) for c in collectives}


def test_traffic_of_sampling() -> None:
    config, layers = tiny(), 3
    row = 384 * 2
    whole = {
        "embedding": ("all-reduce", 1, 10 * row, 6),
        "attention": ("all-reduce", layers, 10 * row, 6),
        "MLP": ("all-reduce", layers, 10 * row, 6),
    }
    assert traffic(sizes(config, 6).sampling_traffic(10)) == whole
    assert sizes(config, 5).sampling_traffic(1)[1].what == "MLP"  # the attention is whole on each rank
    assert [c.what for c in sizes(config, 7).sampling_traffic(1)] == ["embedding"]
    assert sizes(config, 1, replicate=4).sampling_traffic(10) == []


def test_traffic_of_training() -> None:
    config = tiny()
    s = sizes(config, 2, "dtype=float32", replicate=3)
    model = Transformer(config)
    cut = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    layer = sum(
        p.nbytes
        for name, p in model.model.layers[0].named_parameters()
        if name.split(".")[-2] in cut or name.endswith(("o_proj.weight", "down_proj.weight"))
    )
    assert traffic(s.training_traffic(5)) == {
        "layers": ("all-gather", 2 * 3 * 5, layer, 2),
        "embedding, head": ("all-gather", 2 * 5, 320 * 384 * 4, 2),
        "LoRA gradient": ("all-reduce", 1, adapter_bytes(model, 8) + 4, 6),  # and the loss
    }
    assert [c.what for c in sizes(config, 1, replicate=3).training_traffic(5)] == ["LoRA gradient"]
    assert sizes(config).training_traffic(5) == []


def test_a_ring_sends_less_than_it_gathers_and_more_than_it_sums() -> None:
    embedding = sizes(tiny(), 4).sampling_traffic(64)[0]
    assert (embedding.payload, embedding.wire) == (64 * 384 * 2, 2 * 64 * 384 * 2 * 3 // 4)
    layers = sizes(tiny(), 4).training_traffic(1)[0]
    assert layers.wire == layers.payload * 3 // 4


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (1, (), 4),  # 16 rows of 1,024 tokens, four to a forward
        (8, (), 1),
        (3, (), 2),  # six rows
        (1, ("train.micro_batch_tokens=512",), 16),  # a row that is longer stands alone
        (1, ("train.pack_tokens=2048",), 8),
        (8, ("train.pack_tokens=8192",), 4),
    ],
)
def test_micro_batches_of_a_step(ranks: int, overrides: tuple[str, ...], expected: int) -> None:
    assert sizes(tiny(), 1, *overrides, replicate=ranks).num_micro_batches == expected


def test_a_long_row_is_a_micro_batch_of_its_own() -> None:
    config = tiny(max_position_embeddings=800)
    tokens = {micro: sizes(config, 1, f"train.micro_batch_tokens={micro}").train_tokens for micro in (64, 4096)}
    assert tokens == {64: 800, 4096: 4096}
    assert sizes(config, 1, "train.micro_batch_tokens=64", "train.cutoff=200").train_tokens == 200


# ---- Qwen1.5-72B on eight GPUs --------------------------------------------------------------------------------------


def test_72b_on_eight_gpus() -> None:
    plan = preset_plan("qwen1.5-72b", 8, 79.1)
    assert (plan.shard, plan.replicate) == (8, 1)
    assert plan.training["weights"] == 2 * (72_286_601_216 // 8 + 1_318_912)
    assert plan.training["adapters"] == 6 * 104_857_600 * 4
    assert plan.training["gradients, AdamW"] == 3 * 104_857_600 * 4
    assert plan.sizes.kv_token_bytes == 2 * 80 * 8 * 128 * 2
    assert plan.sampling.bytes <= plan.usable < plan.sampling.bytes + 16 * plan.sizes.kv_token_bytes
    assert plan.num_sequences >= 64
    decode = plan.sizes.sampling_traffic(64)
    assert (sum(c.count for c in decode), sum(c.payload for c in decode)) == (161, 161 * 2**20)


def test_more_shards_mean_less_of_everything_but_traffic() -> None:
    plans = [preset_plan("qwen1.5-7b", 8, 80, shard=shard) for shard in (1, 2, 4, 8)]
    for fewer, more in pairwise(plans):
        assert more.training["weights"] < fewer.training["weights"]
        assert more.sampling["logits and draw"] < fewer.sampling["logits and draw"]
        assert more.kv_tokens > fewer.kv_tokens
        fewer_wire, more_wire = (sum(c.wire for c in p.sizes.sampling_traffic(64)) for p in (fewer, more))
        assert more_wire > fewer_wire


# ---- the choice, and what is said where there is none ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_devices", "gib", "mesh"),
    [
        ("qwen1.5-72b", 8, 80, (8, 1)),
        ("qwen1.5-0.5b", 8, 80, (1, 8)),
        ("qwen1.5-7b", 8, 80, (2, 4)),  # one GPU's cache holds 56 sequences
        ("qwen1.5-7b", 1, 80, (1, 1)),  # and will do where there is no other
        ("llama-3-70b", 16, 80, (4, 4)),
        ("llama-3-8b", 6, 80, (1, 6)),
        ("qwen1.5-14b", 6, 40, (2, 3)),  # 40 heads do not divide by 3 or 6: a cache of all of them is smaller
    ],
)
def test_the_mesh_that_is_chosen(name: str, num_devices: int, gib: float, mesh: tuple[int, int]) -> None:
    plan = preset_plan(name, num_devices, gib)
    assert (plan.shard, plan.replicate) == mesh
    assert plan.fits and plan.training.bytes <= plan.usable == int(0.9 * gib * GIB)


def test_given_meshes_are_taken() -> None:
    assert preset_plan("qwen1.5-0.5b", 8, 80, shard=4).replicate == 2
    assert preset_plan("qwen1.5-0.5b", 8, 80, replicate=2).shard == 4
    plan = preset_plan("qwen1.5-0.5b", 8, 80, shard=2, replicate=2)
    assert (plan.shard, plan.replicate) == (2, 2)
    assert plan.lines()[0].endswith("--shard 2 --replicate 2, as given; 4 stay idle")


def test_a_smaller_cache_is_said() -> None:
    (line,) = [line for line in preset_plan("qwen1.5-7b", 1, 80).lines() if line.startswith("the cache holds")]
    assert line == "the cache holds 56 sequences of 2,048 tokens; up to 64 run at once"
    short = choose(tiny(max_position_embeddings=100), run_config(), 1, GIB)
    assert short.sizes.sequence_tokens == 100


@pytest.mark.parametrize("mesh", [{"shard": 3}, {"replicate": 5}, {"shard": 4, "replicate": 4}, {"shard": 16}])
def test_a_mesh_that_does_not_divide(mesh: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"does not divide 8 GPUs: .* one of 1, 2, 4, 8\.$"):
        choose(tiny(), run_config(), 8, 80 * GIB, **mesh)
    with pytest.raises(UserError, match="--shard must be at least 1, not 0"):
        choose(tiny(), run_config(), 8, 80 * GIB, shard=0)


def refusal(*args: Any, **mesh: Any) -> str:
    with pytest.raises(UserError) as raised:
        preset_plan(*args, **mesh)
    assert str(raised.value).count(". ") == 0 and str(raised.value).endswith(".")
    return str(raised.value)


def test_a_refusal_names_what_would_fit() -> None:
    text = refusal("qwen1.5-72b", 2, 80)
    found = re.search(r"--shard 2: training needs ([\d.]+) GiB of each, ([\d.]+) times the 72.0 GiB it may take", text)
    assert found is not None
    assert float(found[1]) / 72 == pytest.approx(float(found[2]), abs=0.01)
    assert "it fits on 4 GPUs of 80.0 GiB with --shard 4" in text
    assert preset_plan("qwen1.5-72b", 4, 80).shard == 4
    (model,) = re.findall(r"a smaller model such as (.*)\.$", text)
    assert preset_plan(model, 2, 80).fits


def test_a_refusal_names_another_shard() -> None:
    text = refusal("qwen1.5-72b", 8, 80, shard=2)
    assert "it fits with --shard 8, or" in text and " GPUs of 80.0 GiB with --shard 8" not in text


def test_a_refusal_names_the_settings_that_would_do() -> None:
    """Each that is named does fit, and its double does not."""
    huge = ("train.micro_batch_tokens=65536", "train.gradient_checkpointing=false")
    text = refusal("llama-3-8b", 1, 80, *huge)
    named = re.findall(r"with (\S+) = (\w+)", text)
    assert [name for name, _ in named] == ["train.gradient_checkpointing", "train.micro_batch_tokens"]
    for name, value in named:
        assert preset_plan("llama-3-8b", 1, 80, *huge, f"{name}={value}").fits
    refusal("llama-3-8b", 1, 80, *huge, f"{named[1][0]}={2 * int(named[1][1])}")


def test_a_cache_that_is_too_large_is_refused() -> None:
    text = refusal("qwen1.5-0.5b", 1, 80, "sampler.kv_cache_gib=75")
    assert "sampling needs" in text and "with sampler.kv_cache_gib = none" in text


def test_what_nothing_helps_says_so() -> None:
    assert "no setting alone would change that" in refusal("smollm2-135m", 1, 0.01)


# ---- the command ----------------------------------------------------------------------------------------------------


def plan_command(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "isheep.plan", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_prints_sums_that_are_right() -> None:
    done = plan_command(
        "--model", "qwen1.5-7b", "--gpus", "8", "--gpu", "h100-80gb", "--shard", "4", "--set", "train.r=4"
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == "qwen1.5-7b in bfloat16 on 8 GPUs of 79.1 GiB: --shard 4 --replicate 2, as given"
    sums: list[float] = []
    for line in lines[: lines.index(next(line for line in lines if line.startswith("the cache")))]:
        name, value = line[:19].strip(), line[19:28]
        if name == "sum":
            assert sum(sums) == pytest.approx(float(value), abs=0.005 * len(sums) + 0.005)
        elif name.endswith("a GPU"):
            sums = []
        else:
            sums.append(float(value))
            check_arithmetic(line)
    assert "9,994,240 × 4 B" in done.stdout  # r 4, and not the paper's 8


def check_arithmetic(line: str) -> None:
    """The formula of a line, computed, is its number of GiB."""
    formula = re.sub(r"[^\d×+(),/ ]", "", line[30:].split(": ")[0]).replace(",", "").replace("×", "*")
    if formula.strip():
        assert eval(formula) / GIB == pytest.approx(float(line[19:28]), abs=0.005), line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model", "qwen1.5-7b", "--gpu", "h100"],
            '--gpu "h100" is neither a known GPU nor a number of GiB. Did you',
        ),
        (["--model", "qwen1.5-7b", "--gpu", "0"], '--gpu "0" is neither'),
        (["--model", "qwen1.5-7", "--gpu", "80"], 'Did you mean "qwen1.5-7b"?'),
        (["--model", "qwen1.5-7b", "--gpu", "80", "--gpus", "0"], "--gpus must be at least 1, not 0."),
        (["--model", "qwen1.5-7b", "--gpu", "80", "--set", "train.rr=1"], 'unknown setting "train.rr"'),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *args])
    with pytest.raises(SystemExit, match="2"):
        run_main(plan_module.main)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_and_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json("llama_gqa")))
    (tmp_path / "run.toml").write_text('dtype = "float32"\n[sampler]\nmax_num_seqs = 7\n')
    args = ["--model", str(tmp_path), "--config", str(tmp_path / "run.toml"), "--gpu", "1"]
    monkeypatch.setattr(sys, "argv", ["plan", *args])
    plan_module.main()
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path} in float32 on 1 GPU of 1.0 GiB: --shard 1 --replicate 1, the only mesh\n")
    assert "up to 7 run at once\nthe GPU talks to no other\n" in text


def test_neither_help_nor_a_wrong_gpu_waits_for_torch() -> None:
    code = "import sys, isheep.plan; isheep.plan.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
