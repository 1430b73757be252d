"""Cross-entropy of a frozen linear head, without ever holding all the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep_kernels import cpu

IGNORE = -100


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden [T, C], weight [V, C], targets [T] -> negative log-likelihood [T] in fp32, 0 where the target is -100."""
    return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=IGNORE, reduction="none")


def _cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Negative log-likelihood [N] fp32 of logits [N, V]; with `gradient` they become softmax − onehot, in place."""
    if cpu.serves(logits):
        nll = torch.empty(len(logits), dtype=torch.float32)
        pointers = logits.data_ptr(), targets.data_ptr(), nll.data_ptr()
        cpu.kernel("cross_entropy", logits.dtype)(*pointers, *logits.shape, gradient)
        return nll
    log_probs = logits.float().log_softmax(-1)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    if gradient:
        probs = log_probs.exp_()
        probs.scatter_add_(1, targets[:, None], probs.new_full((len(probs), 1), -1.0))
        logits.copy_(probs)
    return nll


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy_ref`, `chunk` rows at a time, on the unmasked rows only.

    The gradient of a row's loss by its hidden state, (softmax − onehot) · weight, depends on that row alone. So the
    forward pass, which holds a chunk's probabilities anyway, makes it at once, and backward only scales it by the
    incoming gradient: two matrix products a token in all, and no logits kept or made twice.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        rows = (targets != IGNORE).nonzero().squeeze(1)
        nll = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        by_hidden = hidden.new_empty(len(rows), hidden.shape[1]) if ctx.needs_input_grad[0] else None
        counted = targets[rows]
        if ((counted < 0) | (counted >= len(weight))).any():  # one answer, so that a device is asked once
            raise IndexError(f"a target is out of bounds of the vocabulary of {len(weight)}")
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            logits = hidden[part] @ weight.t()
            nll[part] = _cross_entropy_(logits, counted[start : start + chunk], by_hidden is not None)
            if by_hidden is not None:
                torch.mm(logits, weight, out=by_hidden[start : start + chunk])
        ctx.save_for_backward(by_hidden, rows)
        return nll

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, rows = ctx.saved_tensors
        grad_hidden = by_hidden.new_zeros(len(grads[0]), by_hidden.shape[1])
        grad_hidden[rows] = (by_hidden * grads[0][rows, None]).to(by_hidden.dtype)
        return grad_hidden, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Negative log-likelihood [T] (fp32) of targets under softmax(hidden weightᵀ), differentiable by hidden.

    hidden [T, C], weight [V, C] frozen, targets [T] int64, -100 = not counted (loss 0, no gradient). Extra memory is
    `chunk` rows of logits, whatever T. Raises IndexError where a target is outside the vocabulary.
    """
    return LinearCrossEntropy.apply(hidden, weight, targets, chunk)
