"""k-means in torch, for vectors that need not fit the device: k-means++, Lloyd's iterations, chunks of bounded size.

Distances are compared as |c|² / 2 - x·c, one matrix product a chunk, with the data's mean μ taken out of the centers:
hidden states share a large mean, and its square would swallow what tells the rows apart. Nothing is copied whole and
no sum is left to the order of atomics: a seed gives the same clusters again on the same kind of device.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from isheep.config import UserError

CHUNK_BYTES = 64 * 2**20  # of a chunk's rows, and of their distances to all centers
MAX_ITERATIONS = 300
TOLERANCE = 1e-4  # of a column's mean variance: centers that move less, all together, have arrived
ROUNDING = 1e-10  # of the variance: rows that are so close are equal


def kmeans(vectors: Tensor, num_clusters: int, seed: int, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """vectors [N, C] fp32 -> labels [N] int64 on the CPU, and the inertia Σ |x - its center|².

    `vectors` may stay on the CPU, memory-mapped or not: chunks of them go to `device`, or all where there is room for
    them twice. Some of the K labels have no row where fewer than K rows differ. UserError for fewer rows than clusters.
    """
    if not 1 <= num_clusters <= len(vectors):
        raise UserError(f"{len(vectors)} vectors make no {num_clusters} clusters: ask for 1 to as many as there are.")
    data = Data(vectors, num_clusters, torch.device(device))
    centers = _spread(data, num_clusters, torch.Generator().manual_seed(seed))
    labels, shift = torch.full((len(vectors),), -1), math.inf
    for _ in range(MAX_ITERATIONS):
        found = _assign(data, centers)
        arrived = shift <= TOLERANCE * data.variance / vectors.shape[1] and bool(found.counts.all())
        if arrived or torch.equal(found.labels, labels):
            break
        moved = _means(data, found, centers)
        shift = (moved - centers).square().sum().item()
        labels, centers = found.labels, moved
    return found.labels, found.distances.sum(dtype=torch.float64).item()


class Data:
    """The rows, which come to the device a chunk at a time, and what is known of all of them. Centers are without μ."""

    def __init__(self, vectors: Tensor, num_clusters: int, device: torch.device) -> None:
        """vectors [N, C] fp32. Those that fill at most half of what a GPU has free move there as one."""
        fits = device.type == "cuda" and 2 * vectors.nbytes <= torch.cuda.mem_get_info(device)[0]
        self.vectors, self.device = vectors.to(device) if fits else vectors, device
        self.chunk_rows = max(1, CHUNK_BYTES // (4 * max(num_clusters, vectors.shape[1])))
        self.mean = torch.stack([chunk.sum(0) for chunk in self.chunks()]).sum(0) / len(vectors)  # μ [C] fp32
        squares = [(chunk - self.mean).square_().sum(1).cpu() for chunk in self.chunks()]
        self.squares = torch.cat(squares)  # |x - μ|² [N] fp32 on the CPU
        if not self.squares.isfinite().all():
            raise UserError("some vectors hold infinite values or none at all: measure them with --dtype float32.")

    @property
    def variance(self) -> float:
        """The mean |x - μ|²."""
        return self.squares.mean(dtype=torch.float64).item()

    def chunks(self) -> Iterator[Tensor]:
        """[n, C] fp32 on the device, mean included."""
        return (chunk.to(self.device) for chunk in self.vectors.split(self.chunk_rows))

    def rows(self, places: Tensor) -> Tensor:
        """places [P] -> those rows [P, C], without the mean."""
        return self.vectors[places.to(self.vectors.device)].to(self.device) - self.mean

    def scores(self, chunk: Tensor, centers: Tensor) -> Tensor:
        """centers [K, C] -> (|x - μ - c|² - |x - μ|²) / 2 [n, K] fp32, for the rows x of a chunk [n, C]."""
        bias = centers.square().sum(1) / 2 + centers @ self.mean
        return torch.addmm(bias, chunk, centers.T, alpha=-1)


@dataclass(frozen=True)
class Assigned:
    """Every row's nearest center, and each center's rows."""

    labels: Tensor  # [N] int64 on the CPU
    distances: Tensor  # [N] fp32 on the CPU, |x - c|²
    sums: Tensor  # [K, C] fp32, of the rows with the mean
    counts: Tensor  # [K] fp32


def _spread(data: Data, num_clusters: int, generator: torch.Generator) -> Tensor:
    """The first centers [K, C] by greedy k-means++ (Arthur and Vassilvitskii, 2007).

    Each is the best of 2 + ln K rows that are drawn with probability ∝ |x - nearest center|²: that which leaves the
    smallest sum of these. The draws are made on the CPU in float64, the same for every device.
    """
    num_trials = 2 + int(math.log(num_clusters))
    places = torch.randint(len(data.squares), (1,), generator=generator)
    closest = torch.full_like(data.squares, math.inf)
    chosen = []
    for _ in range(num_clusters):
        nearest = torch.minimum(closest[:, None], _distances(data, places))  # [N, trials]
        best = int(nearest.sum(0, dtype=torch.float64).argmin())
        closest = nearest[:, best]
        closest[places[best]] = 0.0  # exactly: a row is not drawn twice for its rounding
        chosen.append(places[best])
        total = closest.cumsum(0, dtype=torch.float64)
        draws = torch.rand(num_trials, generator=generator, dtype=torch.float64) * total[-1]
        places = torch.searchsorted(total, draws, right=True).clamp_(max=len(total) - 1)
    return data.rows(torch.stack(chosen))


def _distances(data: Data, places: Tensor) -> Tensor:
    """places [P] -> |x - row|² [N, P] fp32 on the CPU, from every row to those at `places`."""
    centers = data.rows(places)
    scores = torch.cat([data.scores(chunk, centers).cpu() for chunk in data.chunks()])
    return scores.mul_(2).add_(data.squares[:, None]).clamp_(min=0)


def _assign(data: Data, centers: Tensor) -> Assigned:
    """One pass over the data: nearest centers, exact distances to them, and the sums for the next ones."""
    labels, distances = [], []
    sums, counts = torch.zeros_like(centers), torch.zeros(len(centers), device=data.device)
    for chunk in data.chunks():
        scores = data.scores(chunk, centers)
        nearest = scores.argmin(1)
        members = scores.zero_().scatter_(1, nearest[:, None], 1.0)
        sums.addmm_(members.T, chunk)  # in a fixed order, which atomic additions would not have
        counts += members.sum(0)
        apart = centers[nearest].add_(data.mean).sub_(chunk)
        labels.append(nearest.cpu())
        distances.append(apart.square_().sum(1).cpu())
    return Assigned(torch.cat(labels), torch.cat(distances), sums, counts)


def _means(data: Data, found: Assigned, centers: Tensor) -> Tensor:
    """The next centers [K, C]: each one's rows' mean. Those without rows take the rows farthest from their centers."""
    means = found.sums / found.counts[:, None] - data.mean
    empty = (found.counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = centers[empty]
        shared = found.counts.cpu()[found.labels] > 1  # a lone row would leave another cluster empty
        apart = found.distances.where(shared & (found.distances > ROUNDING * data.variance), 0.0)
        far = apart.argsort(descending=True, stable=True)[: len(empty)]
        far = far[apart[far] > 0]
        means[empty[: len(far)]] = data.rows(far)
    return means
