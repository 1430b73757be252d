"""From rows to what each optimizer step computes: tokens, the loss mask, the split, packing and order.

All of it follows from the rows, the settings and the seed, so a resumed run sees the same batches.
"""

import hashlib
import math
import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isheep.config import TrainConfig, UserError
from isheep.mesh import Mesh
from isheep.model.batch import PackedBatch
from isheep.model.ops import IGNORE
from isheep.text.templates import Template
from isheep.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """One row's tokens. The loss counts those after the prompt: the response and its end token (paper §6)."""

    input_ids: tuple[int, ...]
    num_prompt_tokens: int

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that are predicted and counted; nothing predicts a sequence's first token."""
        return len(self.input_ids) - max(self.num_prompt_tokens, 1)


@dataclass(frozen=True)
class Step:
    """One optimizer step over the examples with the indices `rows`."""

    number: int  # from 1
    epoch: float  # passes over the data made when this step is done
    rows: tuple[int, ...]


EMPTY = Example((0,), 1)  # a token that no loss counts, for a rank that has no row while others gather weights


def prepare(
    rows: Sequence[Mapping[str, Any]], template: Template, tokenizer: Tokenizer, cfg: TrainConfig, seed: int
) -> tuple[list[Example], list[Example], int]:
    """The first `max_samples` rows as (training examples, validation examples, number of rows dropped).

    A row is dropped when its instruction or output is missing or blank, or no response token is left within the
    cutoff. Raises UserError when nothing remains.
    """
    rows = rows[: cfg.max_samples]
    encoded = [_encode(row, template, tokenizer, cfg.cutoff) for row in rows]
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise UserError(
            f"none of the {len(rows)} rows can be trained on: a row needs an instruction and an output, and "
            f"train.cutoff = {cfg.cutoff} must leave room for a response."
        )
    train, val = split(examples, cfg.val_share, seed)
    return train, val, len(rows) - len(examples)


def _encode(row: Mapping[str, Any], template: Template, tokenizer: Tokenizer, cutoff: int) -> Example | None:
    fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    if not all(isinstance(text, str) for text in fields.values()):
        return None
    if not fields["instruction"].strip() or not fields["output"].strip():
        return None
    prompt, response = template.encode_row(tokenizer, fields, cutoff)
    example = Example((*prompt, *response), len(prompt))
    return example if example.num_loss_tokens > 0 else None


def split(examples: Sequence[Example], val_share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation), each in the given order; with a share and two rows neither is empty."""
    num_val = min(max(1, round(val_share * len(examples))), len(examples) - 1) if val_share > 0 else 0
    chosen = set(random.Random(f"validation {seed}").sample(range(len(examples)), num_val))
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


def make_items(lengths: Sequence[int], pack_tokens: int | None) -> list[tuple[int, ...]]:
    """Indices of the rows of each item: one row, or rows packed best fit into `pack_tokens`.

    Best fit decreasing: from the longest row on, each goes where it leaves the least room. A row is never cut.
    """
    if pack_tokens is None:
        return [(i,) for i in range(len(lengths))]
    items: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, item), sorted; full items are left out
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        free, item = room.pop(at) if at < len(room) else (pack_tokens, len(items))
        if item == len(items):
            items.append([])
        items[item].append(i)
        if free > lengths[i]:
            insort(room, (free - lengths[i], item))
    return [tuple(item) for item in items]


def plan(lengths: Sequence[int], cfg: TrainConfig, seed: int) -> list[Step]:
    """Every step of a run over rows of these lengths. Each epoch visits all items in an order of its own."""
    items = make_items(lengths, cfg.pack_tokens)
    steps_per_epoch = math.ceil(len(items) / cfg.batch_size)
    steps: list[Step] = []
    order: list[tuple[int, ...]] = []
    for n in range(math.ceil(cfg.epochs * steps_per_epoch)):
        epoch, place = divmod(n, steps_per_epoch)
        if place == 0:
            order = random.Random(f"epoch {epoch} {seed}").sample(items, len(items))
        first, last = place * cfg.batch_size, min((place + 1) * cfg.batch_size, len(items))
        rows = tuple(i for item in order[first:last] for i in item)
        steps.append(Step(n + 1, round(epoch + last / len(items), 4), rows))
    return steps


def micro_batches(rows: Sequence[int], lengths: Sequence[int], max_tokens: int, mesh: Mesh) -> list[tuple[int, ...]]:
    """The rows of each forward of this rank. All ranks have equally many, so some may be empty."""
    shares = [cut(share, lengths, max_tokens) for share in divide(rows, lengths, mesh.size)]
    own = shares[mesh.rank]
    return [*own, *[()] * (max(map(len, shares)) - len(own))]


def divide(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Every rank's rows, about equally many tokens: the longest first, each to the rank that has the least."""
    if size == 1:
        return [list(rows)]
    shares: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for i in sorted(rows, key=lambda i: -lengths[i]):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += lengths[i]
    return shares


def cut(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive whole rows, at most `max_tokens` together; a longer row stands alone."""
    parts: list[list[int]] = []
    used = max_tokens
    for i in rows:
        if used + lengths[i] > max_tokens:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += lengths[i]
    return tuple(tuple(part) for part in parts)


def pack(examples: Sequence[Example], device: torch.device, adapter: str) -> tuple[PackedBatch, Tensor]:
    """A micro-batch and its targets [T] int64: each place's next token where the loss counts it, else IGNORE."""
    targets: list[int] = []
    for example in examples:
        first = max(example.num_prompt_tokens, 1)
        targets += [IGNORE] * (first - 1) + list(example.input_ids[first:]) + [IGNORE]
    batch = PackedBatch.pack([example.input_ids for example in examples], device, adapter)
    return batch, torch.tensor(targets, dtype=torch.int64, device=device)


def token_names(rows: Sequence[int], examples: Sequence[Example], device: torch.device) -> Tensor:
    """[T] int64, row · 2^32 + position in the row: what a token of `examples` is called in whatever micro-batch.

    `rows` are the indices of these examples among all, `examples` in the order in which `pack` takes them.
    """
    names: list[int] = []
    for row, example in zip(rows, examples, strict=True):
        names += range(row << 32, (row << 32) + len(example.input_ids))
    return torch.tensor(names, dtype=torch.int64, device=device)


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over the tokens and masks of a set of rows, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.num_prompt_tokens} {list(example.input_ids)}\n".encode())
    return digest.hexdigest()
