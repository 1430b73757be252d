"""The decoder: Qwen2, Llama, Qwen3 and Mistral, on packed tokens, knowing nothing of how it is deployed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isheep.model import ops
from isheep.model.batch import PackedBatch
from isheep.model.config import ModelConfig
from isheep.model.layers import Layer, LayerKV, Linear, RMSNorm, Rotary, frozen

if TYPE_CHECKING:
    from isheep.model.lora import Adapter
    from isheep.model.parallel import VocabShard


class KVCache:
    """Keys and values of every layer, in blocks; made by `Transformer.new_kv_cache`, freed by dropping it."""

    def __init__(self, like: Tensor, config: ModelConfig, num_blocks: int, block_size: int) -> None:
        heads = config.num_key_value_heads
        shapes = ops.kv_cache_shapes(like, num_blocks, block_size, heads, config.head_dim)
        # not zeroed: a slot is read only after it was written
        self.k, self.v = (like.new_empty(config.num_hidden_layers, *shape) for shape in shapes)

    def layer(self, i: int) -> LayerKV:
        return self.k[i], self.v[i]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer: copy on write of a shared block."""
        for source, target in pairs:
            self.k[:, target] = self.k[:, source]
            self.v[:, target] = self.v[:, source]

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return size * block_size


class TokenTable(nn.Module):
    """[V, C], a row for each token: looked up at the input, multiplied with at the output; one for both where tied.

    `packed` is a faster copy held while sampling on a CPU.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = frozen(vocab_size, hidden_size)
        self.packed: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, C]."""
        return F.embedding(ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] -> [N, V]."""
        return ops.linear(hidden, self.weight, None, self.packed)

    def nll(self, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """[T] fp32, as `ops.linear_cross_entropy` says."""
        return ops.linear_cross_entropy(hidden, self.weight, targets, chunk)


class Decoder(nn.Module):
    """Everything but the head: the checkpoint's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = TokenTable(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)


class Transformer(nn.Module):
    """A causal language model. `adapters` are those resident now; `gradient_checkpointing` is the trainer's choice.

    `vocab` says which tokens its logits are of: a range where the model is one rank's view, None for all.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = TokenTable(config.vocab_size, config.hidden_size)
        self.adapters: dict[str, Adapter] = {}
        self.gradient_checkpointing = False
        self.vocab: VocabShard | None = None

    @property
    def head(self) -> TokenTable:
        """The output's table: its own, or the embedding's where the two are tied."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def forward(self, batch: PackedBatch, cache: KVCache | None = None) -> Tensor:
        """Packed tokens -> hidden states [T, C] after the final norm. With a cache the batch must carry `paged`."""
        x = self.model.embed_tokens(batch.input_ids)
        cos_sin = self.model.rotary(batch.positions)
        for i, layer in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos_sin, batch, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos_sin, batch, cache.layer(i) if cache else None)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, C] -> [N, V]. A loss over many tokens takes `nll`, which never holds them all."""
        return self.head.logits(hidden)

    def nll(self, hidden: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """Negative log-likelihood [T] fp32 of targets [T], 0 where not counted; `chunk` rows of logits at a time."""
        return self.head.nll(hidden, targets, chunk)

    def new_kv_cache(self, num_blocks: int, block_size: int) -> KVCache:
        return KVCache(self.model.norm.weight, self.config, num_blocks, block_size)

    def prepack(self, rows: int) -> None:
        """Make the CPU's packed copies of the weights for sampling about `rows` tokens at once; `unpack` drops them."""
        for module in self._products():
            module.packed = ops.prepack(module.weight, rows)

    def unpack(self) -> None:
        for module in self._products():
            module.packed = None

    def _products(self) -> Iterator[Linear | TokenTable]:
        """Every module that multiplies with its weight."""
        yield from (module for module in self.modules() if isinstance(module, Linear))
        yield self.head
