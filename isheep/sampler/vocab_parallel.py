"""The draw of `isheep_kernels.sampling.sample_ref` where each of S ranks holds the logits of one range of token ids.

Every rank gets the same tokens and log-probabilities, and no rank ever holds a row of all V logits. What survives
top-k and top-p is a prefix of the ranking over all ranks, so it is enough to find the weight at which it ends: a radix
search on the bits of that weight, in which each rank answers from its own sorted part. Weights are exp(logit − best
logit), not divided by their sum: the same bits however the vocabulary is split.

What one draw hands to the collectives, for each row:

    always   3 calls     48 bytes    max_ (best logits), gather (surviving mass), max_ (token and its logit)
    top-k    6 calls   2584 bytes    sum_ for each digit, gather (ties at the cut); only if a row asks for it
    top-p    7 calls   2592 bytes    the same after a sum_ of what is left; only if a row asks for it
    top      1 call    24 k bytes    gather, for a row whose k most likely tokens are asked for
    tokens   2 calls   4 k + 4 bytes max_, gather, for a row where k given tokens are asked for
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from isheep.model.parallel import VocabShard

_DIGIT_BITS = 6
_SHIFTS = range(24, -1, -_DIGIT_BITS)  # five digits: a weight is at most 1, whose bits, 0x3F800000, fit in 30


def sample(
    logits: Tensor,
    plain: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    vocab: "VocabShard",
) -> tuple[Tensor, Tensor]:
    """Draw from logits [B, V_r] -> tokens [B] int64, log-probabilities [B] fp32 under `plain`, the untouched logits.

    The parameters [B], as in `sample_ref`, lie on the CPU: what no row asks for is skipped without asking the device.
    """
    any_top_k = bool(((temperature > 0) & (top_k > 0)).any())
    any_top_p = bool(((temperature > 0) & (top_p < 1)).any())
    temperature, top_k, top_p, min_p, uniform = (
        x.to(logits.device)[:, None] for x in (temperature, top_k, top_p, min_p, uniform)
    )
    hot = temperature > 0
    # one impossible token more, so that no range is empty
    logits, plain = (F.pad(x.float(), (0, 1), value=-torch.inf) for x in (logits, plain))
    best, plain_best = vocab.max_(torch.stack([logits.amax(-1, keepdim=True), plain.amax(-1, keepdim=True)]))

    scale = torch.where(hot, temperature, 1.0)
    # greedy: all the likeliest weigh alike, and below the first of them is taken
    weights = torch.where(hot, (logits / scale - best / scale).exp(), (logits == best).float())
    if any_top_k or any_top_p:
        ranked, order = weights.sort(dim=-1, descending=True, stable=True)
        if any_top_k:
            ranked = _cut(ranked, torch.where(top_k > 0, top_k.double(), torch.inf), vocab, by_mass=False)
        if any_top_p:
            left = vocab.sum_(ranked.double().sum(-1, keepdim=True))
            ranked = _cut(ranked, torch.where(top_p < 1, top_p * left, torch.inf), vocab, by_mass=True)
        weights = torch.zeros_like(weights).scatter(1, order, ranked)
    weights = weights * (weights >= min_p)  # the best weighs 1

    cumulative = weights.double().cumsum(-1)
    mass = cumulative[:, -1:]
    plain_mass = (plain - plain_best).exp().double().sum(-1, keepdim=True)
    (start, _), (end, _), (total, plain_total) = _sums_by_range(torch.stack([mass, plain_mass]), vocab)
    target = torch.where(hot, uniform, 0.0) * total
    here = (start <= target) & (target < end)
    # the second condition: rounding never steps past the last survivor
    pick = ((cumulative <= target - start) & (cumulative < mass)).sum(-1, keepdim=True)
    drawn = torch.stack([(vocab.first + pick).double(), plain.gather(1, pick).double()])
    nothing = drawn.new_tensor([0.0, -torch.inf])[:, None, None]
    token, logit = vocab.max_(torch.where(here, drawn, nothing)).squeeze(-1)
    logprob = logit - plain_best.squeeze(-1) - plain_total.squeeze(-1).log()
    return token.long(), logprob.float()


def _cut(ranked: Tensor, limit: Tensor, vocab: "VocabShard", *, by_mass: bool) -> Tensor:
    """Zero all but the shortest prefix of the global ranking that adds up to `limit` [B, 1] fp64 (inf: keep all).

    ranked [B, N] fp32: this rank's weights, falling. A token adds its weight to the sum if `by_mass`, else one.
    """
    keys = -ranked.view(torch.int32)  # rising: floats from 0 up are ordered as their bits are
    added = ranked.double() if by_mass else torch.ones_like(ranked, dtype=torch.float64)
    sums = F.pad(added.cumsum(-1), (1, 0))  # [B, N + 1]: of the first 0, 1, ... N
    digits = torch.arange(2**_DIGIT_BITS, dtype=torch.int32, device=ranked.device)
    cut = torch.zeros_like(keys[:, :1])  # bits of the weight of the prefix's last token
    for shift in _SHIFTS:
        places = torch.searchsorted(keys, -(cut + (digits << shift)), right=True)
        reached = vocab.sum_(sums.gather(1, places)) >= limit  # by the tokens of at least that weight
        cut += (reached.sum(-1, keepdim=True, dtype=torch.int32) - 1).clamp(min=0) << shift  # the largest such digit

    heavier = torch.searchsorted(keys, -cut)
    ties = (torch.searchsorted(keys, -cut, right=True) - heavier).double()
    (_, ties_before), _, (reached_before, _) = _sums_by_range(torch.stack([sums.gather(1, heavier), ties]), vocab)
    tie_adds = cut.view(torch.float32).double() if by_mass else 1.0
    needed = ((limit - reached_before) / tie_adds).ceil() - ties_before  # lower ids first, and so lower ranks first
    place = torch.arange(ranked.shape[1], device=ranked.device)
    return ranked * (place < heavier + torch.minimum(needed, ties).clamp(min=0))


def _sums_by_range(x: Tensor, vocab: "VocabShard") -> tuple[Tensor, Tensor, Tensor]:
    """x [2, B, 1] fp64 of each rank -> its sums over the ranks before this one, those up to this one, and all.

    A range's end and the next one's start are the same bits. An empty range begins where another does and adds nothing.
    """
    values = vocab.gather(torch.cat([x, torch.full_like(x[:1], vocab.first)]))  # [S, 3, B, 1]
    x, begins = values[:, :2], values[:, 2:]
    before, upto = ((x * (begins < bound)).sum(0) for bound in (vocab.first, vocab.first + vocab.size))
    return before, upto, x.sum(0)


def top(row: Tensor, k: int) -> Tensor:
    """Where the k largest of row [N] are, falling, ties by place -> [min(k, N)] int64."""
    # topk itself takes ties in any order, and a stable sort of the whole row costs thirty times as much
    least = row.topk(min(k, len(row))).values[-1:]
    found = (row >= least).nonzero().squeeze(1)
    return found[row[found].sort(descending=True, stable=True).indices[:k]]


def gather_top(ids: Tensor, values: Tensor, lse: Tensor, k: int, vocab: "VocabShard") -> tuple[Tensor, Tensor, Tensor]:
    """Each rank's `top` of one row -> that of the whole row: token ids [k], logits [k] fp64, log of all exp(logit)."""
    mine = lse.new_full((3, k), -torch.inf, dtype=torch.float64)
    mine[0, : len(ids)], mine[1, : len(ids)], mine[2] = ids + vocab.first, values, lse
    all_ids, all_values, all_lse = vocab.gather(mine).unbind(1)
    real = all_ids >= 0  # a range of fewer than k ids leaves places empty
    all_ids, all_values = all_ids[real].long(), all_values[real]
    best = top(all_values, k)
    return all_ids[best], all_values[best], all_lse[:, 0].logsumexp(0)


def token_logprobs(logits: Tensor, ids: Tensor, vocab: "VocabShard") -> Tensor:
    """logits [N, V_r] fp32, ids [N, K] -> log-probabilities [N, K] fp32, the same on every rank."""
    own = ids - vocab.first
    mine = (own >= 0) & (own < vocab.size)
    logits = F.pad(logits, (0, 1), value=-torch.inf)  # one impossible token more, so that no range is empty
    found = vocab.max_(logits.gather(1, torch.where(mine, own, vocab.size)))
    return found - vocab.gather(logits.logsumexp(-1, keepdim=True)).logsumexp(0)
