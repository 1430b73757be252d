"""Memory and traffic of a run on a mesh of GPUs, by arithmetic, before anything is loaded.

    python -m isheep.plan --model qwen1.5-72b --gpus 8 --gpu a800-80gb

GPUs form a mesh, replicate × shard. Each rank holds its part of every sharded weight and computes on it while sampling
(tensor parallel); training gathers one layer after another (FSDP2). `choose` picks the mesh, or says what would fit.
Weights are counted on the model's own parameters, what a pass holds besides on its operators, to a few percent.
"""

import argparse
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from isheep.cli import run_main
from isheep.config import DTYPES, RunConfig, UserError, did_you_mean, load_config, model_preset, model_presets
from isheep.model.config import ModelConfig

if TYPE_CHECKING:
    from isheep.mesh import Mesh

GIB = 2**30
# Stays free of what is planned: the CUDA context and the collectives' buffers take one or two GiB, and the allocator's
# blocks do not fit each other without gaps.
FREE_SHARE = 0.1
# GiB as CUDA reports them, which is less than on the label.
GPUS = {"h100-80gb": 79.1, "a100-80gb": 79.1, "a100-40gb": 39.4, "a800-80gb": 79.1, "h200-141gb": 139.7}
# A request for instructions is about 1,000 tokens of examples and up to 1,000 new ones; an answer or a rating is less.
SEQUENCE_TOKENS = 2048
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What torch's own operators need on top, where no fused kernel serves: see the terms that use them.
MASK_BYTES = 24  # for each element of a LoRA's input: the mask of its dropout is made of three 64-bit integers
DRAW_BYTES = 58  # for each logit of a row that is drawn from: probabilities, their order, sums in double precision


@dataclass(frozen=True)
class Term:
    """Bytes on each GPU, and how they came about."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Memory:
    """What one GPU holds at its fullest moment of a phase."""

    phase: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)

    def __getitem__(self, name: str) -> int:
        return next(term.bytes for term in self.terms if term.name == name)


@dataclass(frozen=True)
class Collective:
    """`count` all-reduces or all-gathers of one step, each of `bytes` over `ranks` GPUs.

    An all-reduce of n bytes counts n, an all-gather the n bytes of its result: `payload`. `wire` is what a rank sends
    for them in a ring of s: 2(s-1)/s · n and (s-1)/s · n.
    """

    kind: str
    what: str
    count: int
    bytes: int
    ranks: int

    @property
    def payload(self) -> int:
        return self.count * self.bytes

    @property
    def wire(self) -> int:
        return (2 if self.kind == "all-reduce" else 1) * self.payload * (self.ranks - 1) // self.ranks


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter, from the model itself; takes no memory."""
    import torch

    from isheep.model.transformer import Transformer

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


@dataclass(frozen=True)
class Sizes:
    """A model with its settings on a mesh. `shapes` are `parameter_shapes(config)`."""

    config: ModelConfig
    cfg: RunConfig
    shapes: dict[str, tuple[int, ...]]
    shard: int
    replicate: int

    # ---- what a rank has of the model ------------------------------------------------------------------------------

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.cfg.dtype]

    @functools.cached_property
    def mesh(self) -> "Mesh":
        """As its first rank sees it, which has the most where something does not divide."""
        from isheep.mesh import Mesh

        return Mesh(self.shard, self.replicate)

    @functools.cached_property
    def local(self) -> ModelConfig:
        """What a rank computes while sampling."""
        from isheep.model.parallel import local_config

        return local_config(self.config, self.mesh)

    @functools.cached_property
    def dims(self) -> dict[str, int]:
        """The parameters that are cut over the ranks, and along which dimension."""
        from isheep.model.parallel import sharded_dim

        found = {name: sharded_dim(name, self.config, self.shard) for name in self.shapes}
        return {name: dim for name, dim in found.items() if dim is not None and self.shard > 1}

    def held(self, name: str) -> int:
        """Elements of a parameter that a rank holds."""
        from isheep.model.parallel import chunk

        shape = list(self.shapes[name])
        if name in self.dims:
            dim = self.dims[name]
            shape[dim] = chunk(shape[dim], self.shard, 0)[1]
        return math.prod(shape)

    def _whole(self, prefix: str) -> int:
        """Elements of all parameters under a prefix that are cut over the ranks, gathered: as many from each rank, so
        that a last, shorter part comes filled up."""
        return sum(self.shard * self.held(name) for name in self.dims if name.startswith(prefix))

    @functools.cached_property
    def adapter_params(self) -> int:
        """lora_A [r, in] and lora_B [out, r] of each target: one adapter."""
        return sum(self.cfg.train.r * sum(self.shapes[name]) for name in self._targets())

    @functools.cached_property
    def adapter_slice_params(self) -> int:
        """Of those, what meets a rank's part of the weights while sampling."""
        from isheep.model.parallel import served

        total = 0
        for name in self._targets():
            sides, part = list(self.shapes[name]), served(name, self.shapes[name], self.config, self.mesh)
            if part is not None:
                sides[part[0]] = part[2]
            total += self.cfg.train.r * sum(sides)
        return total

    def _targets(self) -> Iterator[str]:
        """Weights that an adapter has a pair beside."""
        modules = self.cfg.train.target_modules
        return (name for name in self.shapes if name.endswith(tuple(f".{module}.weight" for module in modules)))

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token, over all layers."""
        return 2 * self.config.num_hidden_layers * self.local.num_key_value_heads * self.config.head_dim * self.itemsize

    @property
    def sequence_tokens(self) -> int:
        return min(SEQUENCE_TOKENS, self.config.context_len)

    # ---- memory ----------------------------------------------------------------------------------------------------

    def training(self) -> Memory:
        """The fuller of two moments: backward through a layer, and the loss. Other weights are gathered for each."""
        p = self.adapter_params
        optimizer = Term("gradients, AdamW", 3 * p * 4, f"3 × {p:,} × 4 B: a gradient and two moments")
        moments = [(self._gathered_layers(), self._layer_backward()), (self._gathered_head(), self._loss())]
        gathered, work = max(moments, key=lambda moment: sum(term.bytes for term in moment))
        return Memory("training", (*self._resident(), optimizer, gathered, self._for_backward(), work))

    def sampling(self, usable: int) -> Memory:
        """In `usable` bytes: what the other terms leave is the cache's."""
        terms = (*self._resident(), self._layer_forward(), self._draw())
        return Memory("sampling", (*terms, self._cache(usable - sum(term.bytes for term in terms))))

    def _resident(self) -> Iterator[Term]:
        """Weights and adapters: of every iteration one, and its copies for the products without a gradient."""
        b, n, p = self.itemsize, self.cfg.iterations, self.adapter_params
        assert n is not None, "not resolved"
        local, cut = sum(map(self.held, self.shapes)), self._whole("")
        whole = sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.dims)
        how = f"{local:,} parameters × {b} B"
        yield Term("weights", local * b, f"{how}: {cut:,} / {self.shard} + {whole:,} whole" if cut else how)
        yield Term("adapters", n * p * 4, f"{n} × {p:,} × 4 B: one an iteration, whole on each GPU")
        sliced = self.adapter_slice_params if self.shard > 1 else 0
        how = (
            f"{n} × ({p:,} + {sliced:,}) × {b} B: to score, and slices to sample" if sliced else f"{n} × {p:,} × {b} B"
        )
        yield Term("adapters' casts", n * (p + sliced) * b, how)

    def _gathered_layers(self) -> Term:
        """FSDP2 holds a layer, the buffer it came in and the next one's, which comes meanwhile. Out of its buffer, what
        is cut by columns takes one copy more."""
        layer = self._whole("model.layers.0.")
        columns = sum(
            math.prod(self.shapes[name])
            for name, dim in self.dims.items()
            if dim and name.startswith("model.layers.0.")
        )
        how = f"(3 × {layer:,} + {columns:,}) × {self.itemsize} B: a layer, two buffers, o and down again"
        return Term("gathered weights", (3 * layer + columns) * self.itemsize, how if layer else "none")

    def _gathered_head(self) -> Term:
        """The head or, tied, the embedding, and the buffer it came in."""
        head = self._whole("model.embed_tokens.")
        how = f"2 × {head:,} × {self.itemsize} B: the head and its buffer"
        return Term("gathered weights", 2 * head * self.itemsize, how if head else "none")

    @property
    def train_tokens(self) -> int:
        """Of the longest micro-batch: a row longer than micro_batch_tokens stands alone."""
        return max(self.cfg.train.micro_batch_tokens, min(self.cfg.train.cutoff, self.config.context_len))

    def _for_backward(self) -> Term:
        """Each layer's input, or all that a layer keeps where it is not computed again."""
        n, tokens, width, b = self.config.num_hidden_layers, self.train_tokens, self.config.hidden_size, self.itemsize
        if self.cfg.train.gradient_checkpointing:
            how = f"{n} layers × {tokens:,} tokens × {width:,} × {b} B: the layers' inputs"
            return Term("kept for backward", n * tokens * width * b, how)
        kept = width * b + self._kept_bytes()
        return Term("kept for backward", n * tokens * kept, f"{n} layers × {tokens:,} tokens × {kept:,} B")

    def _kept_bytes(self) -> int:
        """A token's bytes that one layer keeps for its backward pass besides its input.

        Of C: two norms' results and what follows attention, with fp32 copies in two norms unless all is fp32. Of H · D:
        queries, attention's result and that result packed; of G · D: keys and values; of I: gate, up, silu, product.
        """
        c, b = self.config, self.itemsize
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        norms = c.hidden_size * (3 * b + (8 if b < 4 else 0))
        attention = c.head_dim * b * (3 * heads + 2 * kv_heads) + 4 * heads  # and an fp32 sum for each head
        head_norms = 4 * c.head_dim * (heads + kv_heads) if c.qk_norm else 0
        return norms + attention + head_norms + c.intermediate_size * 4 * b

    def _layer_backward(self) -> Term:
        """One layer computed again, and the widest of its gradients, at down_proj: of its output and the residual's, of
        its input, what comes through lora_A, and the mask of that."""
        c, b, tokens = self.config, self.itemsize, self.train_tokens
        kept = self._kept_bytes() if self.cfg.train.gradient_checkpointing else 0
        widest = c.hidden_size * 2 * b + c.intermediate_size * (2 * b + (MASK_BYTES if self.cfg.train.dropout else b))
        how = f"{tokens:,} tokens × ({kept:,} B of a layer + {widest:,} B of gradients)"
        return Term("at work", tokens * (kept + widest), how)

    def _loss(self) -> Term:
        """A chunk's logits, their fp32 copy and its log-softmax; every token's hidden state, fp32 copy and gradient."""
        c, b, tokens = self.config, self.itemsize, self.train_tokens
        rows, copy = min(self.cfg.train.loss_chunk_tokens, tokens), 4 if b < 4 else 0
        row, token = c.vocab_size * (b + copy + 4) + c.hidden_size * b, c.hidden_size * (2 * b + copy)
        how = f"{rows:,} rows × {row:,} B of logits + {tokens:,} tokens × {token:,} B"
        return Term("at work", rows * row + tokens * token, how)

    def _layer_forward(self) -> Term:
        """The widest of the MLP (gate, up, silu, product), rope (queries in fp32, thrice) and a norm's fp32 copies."""
        c, b, tokens = self.local, self.itemsize, self.cfg.sampler.max_num_batched_tokens
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        mlp = c.hidden_size * 3 * b + c.intermediate_size * 4 * b
        rope = c.hidden_size * 2 * b + c.head_dim * (heads * (2 * b + 12) + kv_heads * 2 * b)
        token = max(mlp, rope, c.hidden_size * (2 * b + 8))
        return Term("at work", tokens * token, f"{tokens:,} tokens × {token:,} B of one layer")

    def _draw(self) -> Term:
        """The logits of all running sequences, and what the draw makes of them."""
        rows, logit = self.cfg.sampler.max_num_seqs, self.itemsize + DRAW_BYTES
        how = f"{rows:,} rows × {self.local.vocab_size:,} logits × {logit} B"
        return Term("logits and draw", rows * self.local.vocab_size * logit, how)

    def _cache(self, rest: int) -> Term:
        """Whole blocks, as the sampler takes them: kv_cache_gib or all that is left, and no more than can be used."""
        s = self.cfg.sampler
        block = s.block_size * self.kv_token_bytes
        limit = rest if s.kv_cache_gib is None else int(s.kv_cache_gib * GIB)
        most = s.max_num_seqs * -(-self.config.context_len // s.block_size)
        blocks = max(0, min(limit // block, most))
        why = "the rest" if s.kv_cache_gib is None else "sampler.kv_cache_gib"
        why = "every sequence's whole context" if blocks == most else why
        how = f"{blocks * s.block_size:,} tokens × {self.kv_token_bytes:,} B: {why}"
        return Term("KV cache", blocks * block, how)

    # ---- traffic ---------------------------------------------------------------------------------------------------

    def sampling_traffic(self, num_tokens: int) -> list[Collective]:
        """One forward of `num_tokens` while sampling: a decode step has a token a sequence, a prefill its prompts'.

        The draw is left out: a dozen calls of some kilobytes a row, which sampler/vocab_parallel.py counts.
        """
        layers, size = self.config.num_hidden_layers, num_tokens * self.config.hidden_size * self.itemsize
        sums = (
            ("embedding", 1, "model.embed_tokens.weight"),
            ("attention", layers, "model.layers.0.self_attn.o_proj.weight"),
            ("MLP", layers, "model.layers.0.mlp.down_proj.weight"),
        )
        return [
            Collective("all-reduce", what, count, size, self.shard) for what, count, name in sums if name in self.dims
        ]

    def training_traffic(self, num_micro_batches: int) -> list[Collective]:
        """One optimizer step of `num_micro_batches` a rank. A layer is gathered for forward and again for backward, the
        embedding and the head once each (the loss makes its gradient in forward); the adapter's gradient is summed, the
        loss with it."""
        layers, b = self.config.num_hidden_layers, self.itemsize
        gathers = (
            ("layers", 2 * layers, self._whole("model.layers.0.")),
            ("embedding, head", 2, self._whole("model.embed_tokens.")),
        )
        found = [
            Collective("all-gather", what, count * num_micro_batches, size * b, self.shard)
            for what, count, size in gathers
            if size
        ]
        ranks = self.shard * self.replicate
        gradient = Collective("all-reduce", "LoRA gradient", 1, (self.adapter_params + 1) * 4, ranks)
        return found + [gradient] * (ranks > 1)

    @property
    def num_micro_batches(self) -> int:
        """Of a rank in an optimizer step whose items are all as long as they may be."""
        t = self.cfg.train
        items = -(-t.batch_size // (self.shard * self.replicate))
        rows = items * (-(-t.pack_tokens // t.cutoff) if t.pack_tokens else 1)
        return -(-rows // max(1, t.micro_batch_tokens // t.cutoff))


@dataclass(frozen=True)
class Plan:
    """A mesh and what it costs. `why` says where the mesh comes from."""

    sizes: Sizes
    num_devices: int
    device_bytes: int
    why: str

    @property
    def shard(self) -> int:
        return self.sizes.shard

    @property
    def replicate(self) -> int:
        return self.sizes.replicate

    @property
    def usable(self) -> int:
        return usable(self.device_bytes)

    @functools.cached_property
    def training(self) -> Memory:
        return self.sizes.training()

    @functools.cached_property
    def sampling(self) -> Memory:
        return self.sizes.sampling(self.usable)

    @property
    def kv_tokens(self) -> int:
        return self.sampling["KV cache"] // self.sizes.kv_token_bytes

    @property
    def num_sequences(self) -> int:
        """Of `sequence_tokens`, that the cache holds."""
        return self.kv_tokens // self.sizes.sequence_tokens

    @property
    def needed(self) -> int:
        """Bytes of the fuller phase, sampling with the cache that is set or, if none is, with one for one sequence."""
        sampling, s, cfg = self.sampling, self.sizes, self.sizes.cfg.sampler
        one = -(-s.sequence_tokens // cfg.block_size) * cfg.block_size * s.kv_token_bytes
        cache = sampling["KV cache"] if cfg.kv_cache_gib is not None else one
        return max(self.training.bytes, sampling.bytes - sampling["KV cache"] + cache)

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @property
    def serves_all(self) -> bool:
        """Whether all sequences that may run at once have room, so that none waits or is preempted."""
        return self.fits and self.num_sequences >= self.sizes.cfg.sampler.max_num_seqs

    def lines(self) -> list[str]:
        """The choice and its arithmetic, for the run's log and for `python -m isheep.plan`."""
        s, n = self.sizes, self.num_devices
        head = f"{s.cfg.model} in {s.cfg.dtype} on {_gpus(n, self.device_bytes)}"
        idle = n - s.shard * s.replicate
        return [
            f"{head}: --shard {s.shard} --replicate {s.replicate}, {self.why}"
            + (f"; {idle} stay idle" if idle else ""),
            *self._memory_lines(),
            *self._traffic_lines(),
        ]

    def _memory_lines(self) -> Iterator[str]:
        for memory in (self.training, self.sampling):
            yield f"{memory.phase + ', a GPU':<19} {'GiB':>8}"
            for term in memory.terms:
                yield f"  {term.name:<17} {term.bytes / GIB:8.2f}  {term.how}"
            share = f"of {self.usable / GIB:.2f}: {1 - FREE_SHARE:.0%} of {self.device_bytes / GIB:.1f}"
            yield f"  {'sum':<17} {memory.bytes / GIB:8.2f}  {share}"
        seqs, tokens = self.sizes.cfg.sampler.max_num_seqs, self.sizes.sequence_tokens
        yield f"the cache holds {self.num_sequences:,} sequences of {tokens:,} tokens; up to {seqs} run at once"

    def _traffic_lines(self) -> Iterator[str]:
        s = self.sizes
        rows, prompt, micro = s.cfg.sampler.max_num_seqs, s.cfg.sampler.max_num_batched_tokens, s.num_micro_batches
        steps = {
            f"decode step, {rows} sequences": s.sampling_traffic(rows),
            f"prefill, {prompt:,} tokens": s.sampling_traffic(prompt),
            f"training step, {micro} micro-batch{'es' * (micro > 1)}": s.training_traffic(micro),
        }
        if not any(steps.values()):
            yield "the GPU talks to no other"
            return
        yield f"{'traffic, a GPU':<31} {'number':>6} {'MiB each':>10} {'MiB':>10} {'MiB sent':>10}"
        for name, collectives in steps.items():
            total, sent = sum(c.payload for c in collectives), sum(c.wire for c in collectives)
            count = sum(c.count for c in collectives)
            yield f"  {name:<29} {count:6,} {'':>10} {total / 2**20:10,.1f} {sent / 2**20:10,.1f}"
            for c in collectives:
                sizes = f"{c.count:6,} {c.bytes / 2**20:10,.1f} {c.payload / 2**20:10,.1f} {c.wire / 2**20:10,.1f}"
                yield f"    {c.what:<27} {sizes}  {c.kind} over {c.ranks}"


def usable(device_bytes: int) -> int:
    return int(device_bytes * (1 - FREE_SHARE))


def choose(
    config: ModelConfig,
    cfg: RunConfig,
    num_devices: int,
    device_bytes: int,
    shard: int | None = None,
    replicate: int | None = None,
) -> Plan:
    """The mesh of a run: what is given, or the smallest shard that serves all sequences which may run at once.

    Fewer shards mean less traffic; a smaller cache, fewer sequences at a time. Where no shard serves them all, the one
    with the largest cache is taken. Raises UserError with what would fit where nothing does, and where `shard` and
    `replicate` do not divide the devices. `cfg.iterations` is resolved.
    """
    _check_mesh(num_devices, shard, replicate)
    shapes = parameter_shapes(config)
    plan = _best(_candidates(config, cfg, shapes, num_devices, device_bytes, shard, replicate))
    if plan.fits:
        return plan
    ways = _ways_out(plan, given=shard is not None or replicate is not None)
    phase = "training" if plan.training.bytes == plan.needed else "sampling"
    raise UserError(
        f"{cfg.model} does not fit on {_gpus(num_devices, device_bytes)} with --shard {plan.shard}: {phase} needs "
        f"{plan.needed / GIB:.1f} GiB of each, {plan.needed / plan.usable:.2f} times the {plan.usable / GIB:.1f} GiB "
        f"it may take" + (f"; it fits {', or '.join(ways)}." if ways else ", and no setting alone would change that.")
    )


def _gpus(num_devices: int, device_bytes: int) -> str:
    return f"{num_devices} GPU{'s' * (num_devices > 1)} of {device_bytes / GIB:.1f} GiB"


def _check_mesh(num_devices: int, shard: int | None, replicate: int | None) -> None:
    for flag, value in (("--shard", shard), ("--replicate", replicate)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}.")
    if num_devices % ((shard or 1) * (replicate or 1)):
        given = [f"{flag} {value}" for flag, value in (("--shard", shard), ("--replicate", replicate)) if value]
        choices = ", ".join(map(str, _divisors(num_devices)))
        raise UserError(
            f"{' × '.join(given)} does not divide {num_devices} GPUs: --shard × --replicate must be one of {choices}."
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _candidates(
    config: ModelConfig,
    cfg: RunConfig,
    shapes: dict[str, tuple[int, ...]],
    num_devices: int,
    device_bytes: int,
    shard: int | None = None,
    replicate: int | None = None,
) -> Iterable[Plan]:
    """Every mesh that uses all devices, by rising shard; or the one that is given."""
    if shard is None and replicate is None:
        meshes = [(d, num_devices // d) for d in _divisors(num_devices)]
    elif shard is None:
        assert replicate is not None
        meshes = [(num_devices // replicate, replicate)]
    else:
        meshes = [(shard, replicate or num_devices // shard)]
    why = "as given" if shard or replicate else "the only mesh" if num_devices == 1 else ""
    for own_shard, own_replicate in meshes:
        yield Plan(Sizes(config, cfg, shapes, own_shard, own_replicate), num_devices, device_bytes, why)


def _best(plans: Iterable[Plan]) -> Plan:
    """The first that serves all sequences, else what fits with the largest cache, else the one that lacks least."""
    plans = list(plans)
    seqs, tokens = plans[0].sizes.cfg.sampler.max_num_seqs, plans[0].sizes.sequence_tokens
    for plan in plans:
        if plan.serves_all:
            why = f"the smallest shard whose training fits and whose cache holds {seqs} sequences of {tokens:,} tokens"
            return replace(plan, why=plan.why or why)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        best = max(fitting, key=lambda plan: plan.num_sequences)
        why = f"the largest cache, though none holds {seqs} sequences of {tokens:,} tokens"
        return replace(best, why=best.why or why)
    return min(plans, key=lambda plan: plan.needed)


def _ways_out(plan: Plan, given: bool) -> list[str]:
    """One change at a time that makes it fit: another mesh, more GPUs, a setting, a smaller model."""
    s, n, size = plan.sizes, plan.num_devices, plan.device_bytes
    ways = []

    def fitting(cfg: RunConfig, num_devices: int) -> Plan | None:
        """With the given mesh where only a setting changes, else with any."""
        mesh = (plan.shard, plan.replicate) if given and num_devices == n and cfg is not s.cfg else (None, None)
        best = _best(_candidates(s.config, cfg, s.shapes, num_devices, size, *mesh))
        return best if best.fits else None

    found = fitting(s.cfg, n) if given else None
    if found is not None:
        ways.append(f"with --shard {found.shard}")
    else:
        more = next(filter(None, (fitting(s.cfg, n * factor) for factor in (2, 4, 8, 16, 32))), None)
        if more is not None:
            ways.append(f"on {_gpus(more.num_devices, size)} with --shard {more.shard}")
    ways += [f"with {text}" for text, cfg in _smaller_settings(s.cfg, lambda cfg: fitting(cfg, n) is not None)]
    other = _smaller_model(plan)
    return [*ways, f"as a smaller model such as {other}"] if other else ways


def _smaller_settings(cfg: RunConfig, fits: Callable[[RunConfig], bool]) -> Iterator[tuple[str, RunConfig]]:
    """Each single setting that is enough, at the largest of its halves."""
    changes: list[tuple[str, str, list]] = [
        ("train", "gradient_checkpointing", [] if cfg.train.gradient_checkpointing else [True]),
        ("train", "micro_batch_tokens", _halves(cfg.train.micro_batch_tokens, cfg.train.cutoff)),
        ("train", "loss_chunk_tokens", _halves(cfg.train.loss_chunk_tokens, 64)),
        ("sampler", "max_num_batched_tokens", _halves(cfg.sampler.max_num_batched_tokens, 256)),
        ("sampler", "max_num_seqs", _halves(cfg.sampler.max_num_seqs, 4)),
        ("sampler", "kv_cache_gib", [] if cfg.sampler.kv_cache_gib is None else [None]),
    ]
    for section, name, values in changes:
        for value in values:
            changed = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
            if fits(changed):
                yield f"{section}.{name} = {'none' if value is None else str(value).lower()}", changed
                break


def _halves(value: int, least: int) -> list[int]:
    """Half of it, a quarter, and so on while it is at least `least`."""
    return [value // 2**k for k in range(1, value.bit_length()) if value // 2**k >= least]


def _smaller_model(plan: Plan) -> str | None:
    """The largest preset that fits where this model does not."""
    own = sum(map(math.prod, plan.sizes.shapes.values()))
    sizes = []
    for name, preset in model_presets().items():
        config = ModelConfig.from_dict(preset.architecture)
        shapes = parameter_shapes(config)
        sizes.append((sum(map(math.prod, shapes.values())), name, config, shapes))
    for count, name, config, shapes in sorted(sizes, key=lambda entry: entry[0], reverse=True):
        if count < own:
            best = _best(_candidates(config, plan.sizes.cfg, shapes, plan.num_devices, plan.device_bytes))
            if best.fits:
                return name
    return None


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m isheep.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a name from configs/models, or a folder with a config.json")
    p.add_argument("--gpus", type=int, default=1, help="how many (default 1)")
    p.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}, or the GiB of one")
    p.add_argument("--shard", type=int, help="GPUs that share one copy of the weights; default: chosen from memory")
    p.add_argument("--replicate", type=int, help="such copies; default: all GPUs are used")
    p.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default bfloat16)")
    p.add_argument("--config", action="append", type=Path, default=[], help="a run's TOML file; later ones win")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be given several times"
    )
    return p


def main() -> None:
    args = parser().parse_args()
    if args.gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {args.gpus}.")
    size = _device_bytes(args.gpu)
    given = {"model": args.model, "out": "runs/plan"} | ({"dtype": args.dtype} if args.dtype else {})
    cfg = load_config(RunConfig, *args.config, given, overrides=args.set)
    preset = model_preset(cfg.model)
    if cfg.iterations is None:
        cfg = replace(cfg, iterations=preset.iterations if preset else 3)
    config = ModelConfig.from_dict(preset.architecture) if preset else _config_of(cfg.model)
    print("\n".join(choose(config, cfg, args.gpus, size, args.shard, args.replicate).lines()))


def _device_bytes(text: str) -> int:
    """'a800-80gb' or '79.1' -> bytes."""
    if text.lower() in GPUS:
        return int(GPUS[text.lower()] * GIB)
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return int(float(text) * GIB)
    raise UserError(f'--gpu "{text}" is neither a known GPU nor a number of GiB.{did_you_mean(text, GPUS)}')


def _config_of(model: str) -> ModelConfig:
    """Of a checkpoint's folder; a plan downloads nothing."""
    from isheep.model.weights import read_config

    if not (Path(model) / "config.json").is_file():
        raise UserError(
            f'"{model}" is no preset and no folder with a config.json, and a plan downloads nothing.'
            f"{did_you_mean(model, model_presets())}"
        )
    return ModelConfig.from_dict(read_config(Path(model)))


if __name__ == "__main__":
    run_main(main)
