"""k-means on a CUDA device: the clusters of the CPU, the same again from a seed, and vectors that do not fit."""

import pytest
import torch

from isheep.filter.kmeans import kmeans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def blobs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    points = 20 * torch.randn(40, 96, generator=generator) + 100
    return points[torch.arange(3000) % 40] + torch.randn(3000, 96, generator=generator)


def test_clusters_are_those_of_the_cpu() -> None:
    labels, inertia = kmeans(blobs(), 40, seed=0, device="cpu")
    found, on_gpu = kmeans(blobs(), 40, seed=0, device="cuda")
    assert torch.equal(found, labels) and on_gpu == pytest.approx(inertia, rel=1e-5)


@pytest.mark.parametrize("num_clusters", [40, 500])
def test_a_seed_gives_the_same_bits_also_where_vectors_stay_on_the_cpu(
    num_clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kmeans(blobs(), num_clusters, seed=1, device="cuda")
    again = kmeans(blobs(), num_clusters, seed=1, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    streamed = kmeans(blobs(), num_clusters, seed=1, device="cuda")
    for labels, inertia in (again, streamed):
        assert torch.equal(labels, first[0]) and inertia == first[1]
