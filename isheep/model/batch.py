"""What a forward pass is given: packed tokens, and when sampling where their keys and values live."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

# (adapter name, first token, last token + 1); tokens that no segment covers see the base model alone.
AdapterSegment = tuple[str, int, int]


@dataclass(frozen=True)
class PagedMeta:
    """Where a sampling batch reads and writes the cache: position p of sequence s is in block_tables[s, p // BS]."""

    slot_mapping: Tensor  # [T] int64, block · block_size + offset of each token of this batch
    block_tables: Tensor  # [S, max_blocks] int32
    context_lens: Tensor  # [S] int32, positions cached once this batch is written
    max_context_len: int  # the longest of them, known on the host

    def to(self, device: torch.device | str) -> "PagedMeta":
        tables, lens = self.block_tables.to(device), self.context_lens.to(device)
        return PagedMeta(self.slot_mapping.to(device), tables, lens, self.max_context_len)


@dataclass(frozen=True)
class PackedBatch:
    """S sequences as one flat row of T tokens. Nothing is padded."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, place of each token in its sequence
    cu_seqlens: Tensor  # [S + 1] int32, sequence s is tokens cu_seqlens[s] .. cu_seqlens[s + 1]
    seqlens: tuple[int, ...]  # [S] the same lengths on the host, so that no kernel launch waits for the device
    adapters: tuple[AdapterSegment, ...] = ()
    paged: PagedMeta | None = None  # None in training and scoring

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @classmethod
    def pack(
        cls, sequences: Sequence[Sequence[int]], device: torch.device | str, adapter: str | None = None
    ) -> "PackedBatch":
        """One batch of whole sequences, for training and scoring."""
        lens = tuple(len(s) for s in sequences)
        ids = torch.tensor([t for s in sequences for t in s], dtype=torch.int64)
        positions = torch.cat([torch.arange(n) for n in lens])
        cu = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
        return cls(ids, positions, cu, lens).to(device).with_adapter(adapter)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        ids, positions, cu = self.input_ids.to(device), self.positions.to(device), self.cu_seqlens.to(device)
        paged = self.paged.to(device) if self.paged else None
        return replace(self, input_ids=ids, positions=positions, cu_seqlens=cu, paged=paged)

    def with_adapter(self, adapter: str | None) -> "PackedBatch":
        """The same tokens, all of them seen through one adapter (None: the base model)."""
        return replace(self, adapters=((adapter, 0, self.num_tokens),) if adapter else ())
