"""One copy of the base weights, two views of it, applied to a model from outside.

Storage. Over the `shard` ranks of a replica, column-parallel weights (q, k, v, gate, up), their biases and the tables
of tokens are cut along dim 0, row-parallel ones (o, down) along dim 1; norms are whole everywhere. Where heads or
inner units do not divide by the ranks, that part of a layer is whole on every rank (`sharded_dim` has the rules).

Training and scoring view: `shard_for_training`. torch's FSDP2 gathers a layer before it is used and frees it after.
Every rank works on tokens of its own. The base is frozen, so there is nothing to reduce but the adapters' gradients.

Sampling view: `sampling_view`. A second tree of modules on the same bytes: each rank computes with its part of every
weight, all ranks of a replica on the same tokens, one sum over the ranks after attention and one after the MLP.

LoRA's A and B are whole on every rank, as are their optimizer states (420 MB for 72B at r 8, against the 145 GB that
FSDP gathers a pass); the sampling view takes slices of them that follow the slices of the weight.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from isheep.mesh import Mesh
from isheep.model.config import ModelConfig
from isheep.model.layers import Linear
from isheep.model.lora import Adapter, LoRAConfig, LoRAPair, adapter_tensors, attach, detach, fill_adapter
from isheep.model.transformer import TokenTable, Transformer

ROW_PARALLEL = ("o_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TABLES = ("embed_tokens", "lm_head")

Slice = tuple[int, int, int]  # (dim, start, length) of a global tensor


# ---- which part of a parameter is where ----------------------------------------------------------------------------


def attention_is_sharded(config: ModelConfig, shard: int) -> bool:
    """Whether each rank has whole query heads, and either whole key/value heads of its own or a part in just one."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return heads % shard == 0 and (kv_heads % shard == 0 or shard % kv_heads == 0)


def sharded_dim(name: str, config: ModelConfig, shard: int) -> int | None:
    """The dimension along which the parameter of that name is cut into `shard` parts; None: whole on every rank."""
    *_, module, leaf = name.split(".")
    if module in TABLES:
        return 0
    if module in ATTENTION:
        divides = attention_is_sharded(config, shard)
        if module in ("k_proj", "v_proj"):  # fewer heads than ranks: whole, and each rank serves one of them
            divides = divides and config.num_key_value_heads % shard == 0
    else:
        divides = module in MLP and config.intermediate_size % shard == 0
    if not divides or (module in ROW_PARALLEL and leaf == "bias"):
        return None
    return 1 if module in ROW_PARALLEL else 0


def chunk(size: int, shard: int, rank: int) -> tuple[int, int]:
    """(start, length) of a rank's part, as torch.chunk cuts: equal parts, the last ones shorter or empty."""
    part = -(-size // shard)
    start = min(rank * part, size)
    return start, min(part, size - start)


def stored(name: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh) -> Slice | None:
    """The slice of a parameter of global `shape` that this rank holds; None: all of it."""
    dim = sharded_dim(name, config, mesh.shard)
    return None if dim is None else (dim, *chunk(shape[dim], mesh.shard, mesh.shard_rank))


def served(name: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh) -> Slice | None:
    """The slice that this rank computes with while sampling: what it holds, or its one head of a whole k or v."""
    *_, module, _ = name.split(".")
    held = stored(name, shape, config, mesh)
    if held is None and module in ("k_proj", "v_proj") and attention_is_sharded(config, mesh.shard):
        head = mesh.shard_rank * config.num_key_value_heads // mesh.shard
        return 0, head * config.head_dim, config.head_dim
    return held


def local_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The shape of what one rank computes while sampling."""
    heads, kv_heads, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if attention_is_sharded(config, mesh.shard):
        heads, kv_heads = heads // mesh.shard, max(1, kv_heads // mesh.shard)
    return replace(
        config,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner if inner % mesh.shard else inner // mesh.shard,
        vocab_size=chunk(config.vocab_size, mesh.shard, mesh.shard_rank)[1],
    )


def local(parameter: Tensor) -> Tensor:
    """This rank's bytes of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


# ---- training and scoring: gathered layer by layer ------------------------------------------------------------------


def shard_for_training(model: Transformer, mesh: Mesh) -> None:
    """Cut the parameters of `model`, still on the meta device, and have FSDP gather them where they are used."""
    dims = {p: sharded_dim(name, model.config, mesh.shard) for name, p in model.named_parameters()}
    assert mesh.devices is not None

    def apply(module: nn.Module) -> FSDPModule:
        return fully_shard(
            module,
            mesh=mesh.devices,
            reshard_after_forward=True,
            shard_placement_fn=lambda p: Shard(dims[p]),  # type: ignore[arg-type]  # those without are ignored
            ignored_params={p for p in module.parameters() if dims.get(p) is None},
        )

    layers = [apply(layer) for layer in model.model.layers]
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])  # its gather overlaps this layer's work on a GPU
    for table in dict.fromkeys((model.model.embed_tokens, model.head)):
        apply(table).set_unshard_in_backward(False)  # frozen, and `nll` makes its gradient in forward
    register_fsdp_forward_method(model.head, "nll")
    apply(model)
    mesh.watch_layers(model.model.layers)


# ---- sampling: each rank with its own part --------------------------------------------------------------------------


class VocabShard:
    """This rank's range of token ids, first .. first + size of `total`, and what is asked of all ranges together."""

    def __init__(self, total: int, mesh: Mesh) -> None:
        self.total, self.shard, self.group = total, mesh.shard, mesh.shard_group
        self.first, self.size = chunk(total, mesh.shard, mesh.shard_rank)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """Largest over the ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[ranks, *x.shape]; x has the same shape on all ranks."""
        found = x.new_empty(self.shard, *x.shape)
        dist.all_gather(list(found), x.contiguous(), group=self.group)
        return found


class VocabParallelTable(TokenTable):
    """One rank's rows of the table of tokens."""

    def __init__(self, rows: int, hidden_size: int, vocab: VocabShard) -> None:
        super().__init__(rows, hidden_size)
        self.vocab = vocab

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, C], each row from the rank that has it."""
        own = ids - self.vocab.first
        outside = (own < 0) | (own >= self.vocab.size)
        if self.vocab.size:
            x = F.embedding(own.masked_fill(outside, 0), self.weight).masked_fill_(outside[:, None], 0)
        else:
            x = self.weight.new_zeros(len(ids), self.weight.shape[1])
        return self.vocab.sum_(x)


def sampling_view(model: Transformer, mesh: Mesh) -> Transformer:
    """The model for the sampler, its adapters of this moment included: other modules, no byte of its own.

    With one rank it is the model itself.
    """
    if mesh.shard == 1:
        return model
    config, shared = local_config(model.config, mesh), VocabShard(model.config.vocab_size, mesh)
    with torch.device("meta"):
        view = Transformer(config)
        view.model.embed_tokens = VocabParallelTable(config.vocab_size, config.hidden_size, shared)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if ".lora." not in name:
            own = _serve(local(parameter), name, tuple(parameter.shape), model.config, mesh)
            setattr(view.get_submodule(path), leaf, nn.Parameter(own, requires_grad=False))
    _sum_partial_outputs(view, model.config, mesh)
    mesh.watch_layers(view.model.layers)
    for name, adapter in model.adapters.items():
        view.adapters[name] = _serve_adapter(adapter, view, model, mesh)
    view.vocab = shared
    return view


def _serve(held: Tensor, name: str, shape: tuple[int, ...], config: ModelConfig, mesh: Mesh) -> Tensor:
    """What this rank computes with, of what it holds of the parameter of that name and global shape."""
    part = served(name, shape, config, mesh)
    return held if part is None or part == stored(name, shape, config, mesh) else held.narrow(*part)


def _sum_partial_outputs(view: Transformer, config: ModelConfig, mesh: Mesh) -> None:
    """Row-parallel products give partial sums: add them up over the ranks, the bias from one of them."""
    for name, module in view.named_modules():
        if name.endswith(ROW_PARALLEL) and sharded_dim(f"{name}.weight", config, mesh.shard) is not None:
            module.register_forward_hook(lambda module, args, y: _all_reduce(y, mesh.shard_group))
            if mesh.shard_rank > 0:
                module.bias = None


def _all_reduce(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def _serve_adapter(adapter: Adapter, view: Transformer, model: Transformer, mesh: Mesh) -> Adapter:
    """The adapter on the view's layers, as slices of its own tensors: what the trainer writes is read here."""
    pairs: Mapping[str, LoRAPair] = adapter.pairs
    sliced = {}
    for path, pair in pairs.items():
        shape = (len(pair.lora_B), pair.lora_A.shape[1])
        part = served(f"{path}.weight", shape, model.config, mesh)
        linear = view.get_submodule(path)
        assert isinstance(linear, Linear)
        linear.lora[adapter.name] = sliced[path] = pair.sliced(part)
    return replace(adapter, pairs=sliced)


# ---- adapters, whole on every rank ---------------------------------------------------------------------------------


def share_adapter(adapter: Adapter, mesh: Mesh) -> None:
    """Give every rank the leader's adapter; `take_adapter` is the followers' part."""
    if mesh.size > 1:
        tensors = {key: tensor.cpu() for key, tensor in adapter_tensors(adapter).items()}
        mesh.command("adapter", name=adapter.name, config=adapter.config, tensors=tensors)


def withdraw_adapter(model: Transformer, name: str, mesh: Mesh) -> None:
    """Take an adapter off the model, on every rank; a follower's own part is `detach`."""
    detach(model, name)
    if mesh.size > 1:
        mesh.command("withdraw", name=name)


def take_adapter(model: Transformer, name: str, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    """Put the leader's adapter on this rank's model, or its newest numbers into the one that is there."""
    fill_adapter(model.adapters.get(name) or attach(model, config, name), tensors)
