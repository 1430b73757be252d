"""From logits to tokens: penalties and masks, then the draw, with randomness keyed by request, sample and position."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isheep.model import ops
from isheep.sampler import vocab_parallel
from isheep.sampler.request import SamplingParams, Sequence

if TYPE_CHECKING:
    from isheep.model.parallel import VocabShard

_MASK64 = 2**64 - 1


def stream_key(seed: int, request_id: str, sample: int) -> int:
    """64 bits that name one sample's stream of random numbers."""
    return int.from_bytes(blake2b(f"{seed}\0{request_id}\0{sample}".encode(), digest_size=8).digest(), "little")


def uniform(key: int, position: int) -> float:
    """The number in [0, 1) that draws a stream's token at `position`: splitmix64, so no state to keep or to resume."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def draw(
    logits: Tensor,
    seqs: Seq[Sequence],
    keys: Seq[int],
    ends: Seq[frozenset[int]],
    vocab: "VocabShard | None" = None,
) -> tuple[Tensor, Tensor]:
    """One token for each sequence from its row of logits [B, V] -> tokens [B] int64, log-probabilities [B] fp32.

    `keys` are the sequences' stream keys, `ends` their end tokens (kept out until min_tokens). The log-probabilities
    are the model's own, before penalties, masks, temperature and truncation. With `vocab`, the logits are [B, V_r] of
    this rank's range of token ids, and every rank gets the same tokens.
    """
    params = [seq.request.params for seq in seqs]
    changed = [i for i, seq in enumerate(seqs) if _needs_change(seq)]
    adjusted = logits
    if changed:
        adjusted = logits.to(torch.float32, copy=True)
        for i in changed:
            _change(adjusted[i], seqs[i], ends[i], vocab.first if vocab else 0)
    columns = (
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor([uniform(k, s.num_output_tokens) for k, s in zip(keys, seqs, strict=True)], dtype=torch.float64),
    )
    if vocab is not None:
        return vocab_parallel.sample(adjusted, logits, *columns, vocab)
    tokens, logprobs = ops.sample(adjusted, *_moved(columns, logits.device))
    asked = [i for i in changed if params[i].logprobs is not None]
    if asked:
        plain = logits[asked].float().log_softmax(-1)
        logprobs[asked] = plain.gather(1, tokens[asked, None]).squeeze(1)
    return tokens, logprobs


def top_logprobs(logits: Tensor, k: int, vocab: "VocabShard | None" = None) -> list[list[float]]:
    """The k most likely tokens of one row [V], ties by id: [[token id, log-probability], ...].

    With `vocab`, the row is [V_r], this rank's range, and every rank gets the list for all of it.
    """
    if k == 0:
        return []
    row = logits.float()
    ids, lse = vocab_parallel.top(row, k), row.logsumexp(-1)
    values = row[ids]
    if vocab is not None:
        ids, values, lse = vocab_parallel.gather_top(ids, values, lse, k, vocab)
    return [[i, v] for i, v in zip(ids.tolist(), (values - lse).tolist(), strict=True)]


def token_logprobs(logits: Tensor, ids: Tensor, vocab: "VocabShard | None" = None) -> Tensor:
    """Log-probabilities [N, K] fp32 of tokens ids [N, K] int64 under logits [N, V], or [N, V_r] with `vocab`."""
    logits = logits.float()
    if vocab is not None:
        return vocab_parallel.token_logprobs(logits, ids, vocab)
    return logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)


def entry(logits: Tensor, token: int, logprob: float, params: SamplingParams, vocab: "VocabShard | None") -> dict:
    """What `Completion.logprobs` says of one token, from the row [V] of logits that predicts it."""
    found = {"token_id": token, "logprob": logprob, "top": top_logprobs(logits, params.logprobs or 0, vocab)}
    if params.logprob_token_ids:
        ids = torch.tensor(params.logprob_token_ids, device=logits.device)
        found["asked"] = token_logprobs(logits[None], ids[None], vocab)[0].tolist()
    return found


def _penalised(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _needs_change(seq: Sequence) -> bool:
    p = seq.request.params
    return _penalised(p) or p.allowed_token_ids is not None or seq.num_output_tokens < p.min_tokens


def _change(row: Tensor, seq: Sequence, ends: frozenset[int], first: int) -> None:
    """Apply penalties and masks to one fp32 row [V], or to its part that begins with token id `first`, in place.

    repetition: over prompt and output, positive logits divided and negative ones multiplied (CTRL). presence and
    frequency: over the output, as OpenAI's API defines them.
    """
    p = seq.request.params
    if p.repetition_penalty != 1:
        seen = _places(seq.token_ids, row, first).unique().to(row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if seq.num_output_tokens and (p.presence_penalty or p.frequency_penalty):
        seen, counts = _places(seq.output_token_ids, row, first).unique(return_counts=True)
        row[seen.to(row.device)] -= (p.presence_penalty + p.frequency_penalty * counts).to(row.device)
    if p.allowed_token_ids is not None:
        allowed = _places(p.allowed_token_ids, row, first).to(row.device)
        kept = row[allowed]
        row.fill_(-torch.inf)[allowed] = kept
    if seq.num_output_tokens < p.min_tokens:
        row[_places(ends, row, first).to(row.device)] = -torch.inf


def _places(ids: Collection[int], row: Tensor, first: int) -> Tensor:
    """Where in the row these token ids are, on the host; ids that it does not hold are left out."""
    places = torch.tensor(list(ids), dtype=torch.int64) - first
    return places[(places >= 0) & (places < len(row))]


def _moved(columns: Seq[Tensor], device: torch.device) -> list[Tensor]:
    """The columns on a device, by one copy: each copy of what torch has not pinned waits for the device."""
    sizes = [column.nbytes for column in columns]
    packed = torch.cat([column.view(torch.uint8) for column in columns]).to(device)
    return [part.view(column.dtype) for part, column in zip(packed.split(sizes), columns, strict=True)]
