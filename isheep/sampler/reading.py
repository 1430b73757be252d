"""What a forward pass shows besides the next token: log-probabilities of the prompt, and pooled hidden states.

Neither costs a pass. The hidden states are those that sampling computes anyway; the head is applied to more of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from isheep.model.transformer import Transformer
from isheep.sampler import sampling
from isheep.sampler.scheduler import Chunk

HEAD_ROWS = 256  # rows of logits at once: 256 of 152k tokens are 78 MB in bf16


def read_prompts(model: Transformer, chunks: Sequence[Chunk], hidden: Tensor) -> Iterator[tuple[tuple, int, dict]]:
    """(a sequence's key, place, entry) of each prompt token whose log-probability is asked for and known now.

    hidden [T, C] are the chunks' tokens in this order. An entry is one of `Completion.prompt_logprobs`.
    """
    found = list(_predicting(chunks))
    for at in range(0, len(found), HEAD_ROWS):
        part = found[at : at + HEAD_ROWS]
        logits = model.logits(hidden[[row for row, _, _ in part]])
        tokens = [chunk.seq.token_ids[place] for _, chunk, place in part]
        ids = torch.tensor(tokens, device=logits.device)[:, None]
        logprobs = sampling.token_logprobs(logits, ids, model.vocab)[:, 0].tolist()
        for row, (_, chunk, place), token, logprob in zip(logits, part, tokens, logprobs, strict=True):
            seq = chunk.seq
            yield seq.key, place, sampling.entry(row, token, logprob, seq.request.params, model.vocab)


def _predicting(chunks: Sequence[Chunk]) -> Iterator[tuple[int, Chunk, int]]:
    """(row, chunk, place) where the row's hidden state predicts a prompt token asked for, at `place` in the prompt."""
    starts = accumulate((chunk.num_tokens for chunk in chunks), initial=0)
    for chunk, start in zip(chunks, starts):
        num_prompt, num_asked = chunk.seq.num_prompt_tokens, chunk.seq.request.params.num_prompt_logprobs
        first = max(chunk.start + 1, num_prompt - num_asked)
        for place in range(first, min(chunk.end + 1, num_prompt)):
            yield start + place - 1 - chunk.start, chunk, place


class Pools:
    """Mean and last hidden state of each sequence that asks for them, gathered over its passes; a slot for each."""

    def __init__(self, num_slots: int, hidden_size: int, device: torch.device) -> None:
        self._sums = torch.zeros(num_slots, hidden_size, device=device)
        self._last = torch.zeros(num_slots, hidden_size, device=device)
        self._free = list(range(num_slots))
        self._slots: dict[tuple[str, int], tuple[int, int]] = {}  # key -> slot, tokens so far

    def add(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Take in the chunks' hidden states [T, C]."""
        ends = accumulate(chunk.num_tokens for chunk in chunks)
        pooled = [(chunk, end) for chunk, end in zip(chunks, ends) if chunk.seq.request.params.pool]
        if not pooled:
            return
        rows, owners, slots = list[int](), list[int](), list[int]()
        for chunk, end in pooled:
            slot, num_tokens = self._slots.get(chunk.seq.key) or self._new()
            assert num_tokens == chunk.start, f"{chunk.seq.key}: a token was not computed here"
            self._slots[chunk.seq.key] = (slot, chunk.end)
            rows += range(end - chunk.num_tokens, end)
            owners += [slot] * chunk.num_tokens
            slots.append(slot)
        self._sums.index_add_(0, torch.tensor(owners, device=hidden.device), hidden[rows].float())
        self._last[slots] = hidden[[end - 1 for _, end in pooled]].float()

    def _new(self) -> tuple[int, int]:
        slot = self._free.pop()
        self._sums[slot] = 0
        return slot, 0

    def take(self, key: tuple[str, int]) -> Tensor:
        """[2, C] fp32 on the CPU: mean and last, of a sequence that is finished."""
        slot, num_tokens = self._slots[key]
        self.forget([key])
        return torch.stack([self._sums[slot] / num_tokens, self._last[slot]]).cpu()

    def forget(self, keys: Iterable[tuple[str, int]]) -> None:
        """These sequences are gone, or will start again."""
        for key in keys:
            if key in self._slots:
                self._free.append(self._slots.pop(key)[0])
