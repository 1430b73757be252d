"""What a model and its settings take on a mesh, by arithmetic: bytes on a GPU, and what the GPUs say to each other.

Weights are counted on the model's own parameters, what a pass holds besides on its operators, to a few percent.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isheep.config import RunConfig
from isheep.model.config import ModelConfig

if TYPE_CHECKING:
    from isheep.mesh import Mesh

GIB = 2**30
# A request for instructions is about 1,000 tokens of examples and up to 1,000 new ones; an answer or a rating is less.
SEQUENCE_TOKENS = 2048
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# What torch's definitions need on top, see the terms that use them. Triton's kernels need less: until they have been
# measured on a GPU the plan stays on the safe side.
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
        """The widest of the MLP (gate, up, silu, product), rope (queries in fp32, thrice) and a sum's norm in fp32."""
        c, b, tokens = self.local, self.itemsize, self.cfg.sampler.max_num_batched_tokens
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        mlp = c.hidden_size * 3 * b + c.intermediate_size * 4 * b
        rope = c.hidden_size * 2 * b + c.head_dim * (heads * (2 * b + 12) + kv_heads * 2 * b)
        token = max(mlp, rope, c.hidden_size * (3 * b + 8))
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
