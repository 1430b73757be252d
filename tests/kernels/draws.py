"""Draws of every kind, and how far one may be from the definition."""

import torch

from isheep_kernels.sampling import sample_ref


def parameters(rows: int, seed: int):
    """A random mixture of everything, each truncation off in about half of the rows."""
    generator = torch.Generator().manual_seed(seed)

    def rand(dtype=torch.float32):
        return torch.rand(rows, generator=generator, dtype=dtype)

    def one_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    temperature = torch.where(rand() < 0.1, 0.0, 0.05 + 2 * rand())
    temperature = torch.where(rand() < 0.2, 1.0, temperature)
    top_k = torch.where(rand() < 0.5, 0, one_of(1, 2, 5, 40, 10**6)).to(torch.int32)
    top_p = torch.where(rand() < 0.5, 1.0, one_of(1e-6, 0.1, 0.5, 0.95, 0.9999))
    min_p = torch.where(rand() < 0.5, 0.0, one_of(1e-4, 0.05, 0.5, 1.0))
    return temperature, top_k, top_p, min_p, rand(torch.float64)


def neighbours(logits, temperature, top_k, top_p, min_p, uniform):
    """The definition's tokens when its inputs move by a part in a million."""
    return {
        sample_ref(logits, temperature, top_k, top_p * p, min_p * m, (uniform + u).clamp(0, 1 - 1e-16))[0].item()
        for p in (1 - 1e-6, 1, 1 + 1e-6)
        for m in (1 - 1e-6, 1, 1 + 1e-6)
        for u in (-1e-6, 0, 1e-6)
    }
