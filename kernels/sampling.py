"""Drawing the next token: temperature, top-k, top-p, min-p, and the model's own log-probability of what was drawn."""

import torch
from torch import Tensor


def sample_ref(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """logits [B, V]; temperature, top_p, min_p [B] fp32; top_k [B] int32 (0 = all); uniform [B] fp64 in [0, 1).

    -> tokens [B] int64, log-probabilities [B] fp32 under the untouched model. Temperature 0: the likeliest token.
    Tokens are ranked by falling probability (ties: by id) and cut by top-k, then to the smallest set that holds top-p
    of what is left, then by min-p times the best. `uniform` picks along the survivors' cumulative sum, by rising id.
    """
    plain = logits.float()
    hot = temperature > 0
    probs = torch.softmax(plain / torch.where(hot, temperature, 1.0)[:, None], -1)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[1], device=probs.device)
    ranked = ranked * ((top_k <= 0)[:, None] | (place < top_k[:, None]))
    before = ranked.double().cumsum(-1) - ranked
    keep = (before < top_p[:, None] * ranked.double().sum(-1, keepdim=True)) | (top_p >= 1)[:, None]
    keep &= ranked >= min_p[:, None] * ranked[:, :1]
    kept = torch.zeros_like(probs).scatter(1, order, ranked * keep)
    cumulative = kept.double().cumsum(-1)
    pick = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(-1)
    last = (kept > 0).long().cumsum(-1).argmax(-1)  # rounding never steps past the last survivor
    tokens = torch.where(hot, torch.minimum(pick, last), plain.argmax(-1))
    return tokens, plain.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
