"""k-means against scikit-learn's; the same from a seed, whatever the chunks; edges; and how much memory it takes."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isheep.config import UserError
from isheep.filter import kmeans as module
from isheep.filter.kmeans import kmeans


def noise(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, width, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, width: int, num: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around `num` points, far from the origin as hidden states are, and the point that each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    points = apart * torch.randn(num, width, generator=generator) + 100
    belongs = torch.randint(num, (n,), generator=generator)
    return points[belongs] + torch.randn(n, width, generator=generator), belongs


def inertia_of(vectors: torch.Tensor, labels: torch.Tensor) -> float:
    """Σ |x - mean of its cluster|² in float64."""
    rows = vectors.double()
    return sum((rows[labels == k] - rows[labels == k].mean(0)).square().sum().item() for k in labels.unique())


# Such that a start's luck moves the inertia by half a percent: the mean of five is then within 1 % or wrong.
DATA = {
    "noise": (noise(1000, 12), 20),
    "blobs": (blobs(1000, 12, 20, apart=0.7)[0], 20),
    "more clusters than blobs": (blobs(1000, 8, 20, apart=2.0)[0], 50),
}


@pytest.mark.parametrize("name", DATA)
def test_inertia_is_scikit_learns(name: str) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    vectors, num_clusters = DATA[name]
    seeds = range(5)
    ours = [kmeans(vectors, num_clusters, seed)[1] for seed in seeds]
    theirs = [
        cluster.KMeans(num_clusters, init="k-means++", n_init=1, random_state=seed).fit(vectors.numpy()).inertia_
        for seed in seeds
    ]
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.01)


def test_clusters_are_the_blobs_and_their_inertia_is_exact() -> None:
    vectors, belongs = blobs(600, 12, 7, apart=20.0)
    labels, inertia = kmeans(vectors, 7, seed=1)
    pairs = set(zip(labels.tolist(), belongs.tolist()))
    assert labels.shape == (600,) and labels.dtype == torch.int64 and len(pairs) == 7
    assert inertia == pytest.approx(inertia_of(vectors, labels), rel=1e-5)


def test_a_seed_gives_the_same_again_and_leaves_the_global_generator_alone() -> None:
    vectors = noise(500, 8)
    state = torch.get_rng_state()
    labels, inertia = kmeans(vectors, 15, seed=3)
    torch.rand(1)
    again, same = kmeans(vectors, 15, seed=3)
    assert torch.equal(labels, again) and inertia == same
    assert not torch.equal(labels, kmeans(vectors, 15, seed=4)[0])
    torch.set_rng_state(state)
    kmeans(vectors, 15, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 499])
def test_chunks_change_nothing(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = blobs(500, 8, 9, apart=2.0)
    whole, inertia = kmeans(vectors, 12, seed=0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 12 * chunk_rows)
    labels, in_chunks = kmeans(vectors, 12, seed=0)
    assert torch.equal(labels, whole) and in_chunks == pytest.approx(inertia, rel=1e-6)


def test_a_cluster_without_rows_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All centers start in one place, so that all rows are the first one's."""
    vectors, _ = blobs(300, 6, 5, apart=20.0)
    monkeypatch.setattr(module, "_spread", lambda data, k, generator: data.rows(torch.zeros(k, dtype=torch.int64)))
    labels, inertia = kmeans(vectors, 5, seed=0)
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert inertia == pytest.approx(inertia_of(vectors, labels), rel=1e-5)
    assert inertia < 0.5 * inertia_of(vectors, torch.zeros(300, dtype=torch.int64))


def test_as_many_clusters_as_rows() -> None:
    vectors = 1e-3 * noise(40, 5) + 10
    labels, inertia = kmeans(vectors, 40, seed=0)
    assert sorted(labels.tolist()) == list(range(40)) and inertia == pytest.approx(0, abs=1e-9)


def test_one_cluster_is_the_variance() -> None:
    vectors = noise(50, 5)
    labels, inertia = kmeans(vectors, 1, seed=0)
    assert labels.tolist() == [0] * 50
    assert inertia == pytest.approx(inertia_of(vectors, labels), rel=1e-5)


@pytest.mark.parametrize(("num_clusters", "num_different"), [(4, 4), (10, 4), (24, 4), (3, 1), (24, 1)])
def test_equal_rows_are_never_apart(num_clusters: int, num_different: int) -> None:
    belongs = torch.arange(24) % num_different
    vectors = (10 * noise(num_different, 5) + 3)[belongs]
    labels, inertia = kmeans(vectors, num_clusters, seed=0)
    assert len(set(zip(labels.tolist(), belongs.tolist()))) == num_different == len(labels.unique())
    assert inertia == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_clusters", [0, 6, 1000])
def test_more_clusters_than_rows_are_refused(num_clusters: int) -> None:
    with pytest.raises(UserError, match=f"5 vectors make no {num_clusters} clusters"):
        kmeans(noise(5, 3), num_clusters, seed=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_that_is_no_number_is_refused(bad: float) -> None:
    vectors = noise(5, 3)
    vectors[2, 1] = bad
    with pytest.raises(UserError, match="--dtype float32"):
        kmeans(vectors, 2, seed=0)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made; views of what is there do not count."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given, self.bytes = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("num_rows", "width", "num_clusters"), [(2000, 64, 15), (2000, 16, 100)])
def test_nothing_larger_than_a_chunk_is_made(
    num_rows: int, width: int, num_clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = noise(num_rows, width)
    limit = 64 * 1024
    assert 4 * num_rows * max(width, num_clusters) > 7 * limit
    monkeypatch.setattr(module, "CHUNK_BYTES", limit)
    with Largest(vectors) as largest:
        kmeans(vectors, num_clusters, seed=0)
    trials = 4 * num_rows * (2 + int(math.log(num_clusters)))  # a few numbers a row, however wide the rows are
    assert 0 < largest.bytes <= max(limit, trials)
