"""Drawing the next token: temperature, top-k, top-p, min-p, and the model's own log-probability of what was drawn."""

import torch
from torch import Tensor


def sample_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """logits [B, V]; temperature, top_p, min_p [B] fp32; top_k [B] int32 (0 = all); uniform [B] fp64 in [0, 1).

    -> tokens [B] int64, log-probabilities [B] fp32 under the untouched model. Temperature 0 takes the likeliest token.
    Tokens are ordered by falling probability (ties: by id) and truncated by top-k, then by the smallest set that holds
    top-p of what is left, then by min-p times the best; `uniform` picks along the cumulative sum.
    """
    plain = logits.float()
    hot = temperature > 0
    scaled = plain / torch.where(hot, temperature, 1.0)[:, None]
    probs, order = torch.softmax(scaled, -1).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[1], device=probs.device)
    probs = probs * ((top_k <= 0)[:, None] | (place < top_k[:, None]))
    before = probs.cumsum(-1) - probs
    keep = (before < top_p[:, None] * probs.sum(-1, keepdim=True)) & (probs >= min_p[:, None] * probs[:, :1])
    keep |= (place == 0) | (top_p >= 1)[:, None] & (probs >= min_p[:, None] * probs[:, :1])
    cumulative = (probs * keep).double().cumsum(-1)
    pick = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(-1).clamp(max=probs.shape[1] - 1)
    pick = torch.minimum(pick, keep.long().cumsum(-1).argmax(-1))  # rounding never steps past the last kept token
    tokens = torch.where(hot, order.gather(1, pick[:, None]).squeeze(1), plain.argmax(-1))
    return tokens, plain.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
