"""The draw over a split vocabulary: ranks as threads against `sample_ref` on whole rows, then two real processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from isheep.sampler import sampling, vocab_parallel
from isheep.sampler.request import Request, SamplingParams, Sequence
from isheep_kernels.sampling import sample_ref
from tests.kernels.test_sampling import SHARPNESS, parameters
from tests.kernels.yardstick import randn

SPLITS = ((5003,), (2502, 2501), (1700, 3, 3300), (1251, 1251, 1251, 1250), (0, 4000, 0, 1003), (5, 0), (2, 2, 1, 0))


class ThreadShard:
    """One rank's range where the ranks are threads; it notes each collective and the bytes handed to it."""

    def __init__(self, sizes, rank, barrier, sent):
        self.first, self.size, self.total = sum(sizes[:rank]), sizes[rank], sum(sizes)
        self.rank, self.barrier, self.sent, self.calls = rank, barrier, sent, []

    def exchange(self, name, x):
        self.calls.append((name, x.nbytes))
        self.sent[self.rank] = x.clone()
        self.barrier.wait()
        everything = torch.stack(self.sent)
        self.barrier.wait()  # nobody overwrites what another has yet to read
        return everything

    def sum_(self, x):
        return x.copy_(self.exchange("sum_", x).sum(0))

    def max_(self, x):
        return x.copy_(self.exchange("max_", x).amax(0))

    def gather(self, x):
        return self.exchange("gather", x)


class ProcessShard:
    """The same over the processes of torch.distributed."""

    def __init__(self, sizes, rank):
        self.first, self.size, self.total = sum(sizes[:rank]), sizes[rank], sum(sizes)

    def sum_(self, x):
        dist.all_reduce(x)
        return x

    def max_(self, x):
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def gather(self, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.stack(parts)


def on_ranks(sizes, work):
    """work(shard) on each rank at once -> the results in the order of the ranks."""
    barrier, sent = threading.Barrier(len(sizes), timeout=60), [None] * len(sizes)

    def run(rank):
        try:
            return work(ThreadShard(sizes, rank, barrier, sent))
        except BaseException:
            barrier.abort()  # the others fail too, instead of waiting
            raise

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(run, range(len(sizes))))


def part(x, shard):
    """The rank's columns of x [..., V]."""
    return x[..., shard.first : shard.first + shard.size]


def draw(logits, given, sizes):
    """What each rank draws from its part, which must be one and the same -> tokens, log-probabilities."""

    def work(shard):
        return vocab_parallel.sample(part(logits, shard), part(logits, shard), *given, shard)

    first, *others = on_ranks(sizes, work)
    assert all(torch.equal(first[0], tokens) and torch.equal(first[1], logprobs) for tokens, logprobs in others)
    return first


def rows(*values_of_column):
    """Parameters [B] from lists: temperature, top_k, top_p, min_p, uniform."""
    dtypes = torch.float32, torch.int32, torch.float32, torch.float32, torch.float64
    return [torch.tensor(values, dtype=dtype) for values, dtype in zip(values_of_column, dtypes, strict=True)]


@pytest.mark.parametrize("quantised", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_same_token_as_the_definition(sizes, sharpness, quantised):
    vocab = sum(sizes)
    logits = randn(300, vocab, seed=vocab) * SHARPNESS[sharpness]
    if quantised:
        logits = (logits * 2).round() / 2
    logits[100:200].masked_fill_(randn(100, vocab, seed=1) > 0.3, -torch.inf)
    logits[200:230, : sizes[0]] = -torch.inf  # a rank without a possible token
    logits[:, -1] = logits[:, -1].nan_to_num(neginf=0.0)  # a row needs one
    given = parameters(300, seed=vocab)
    tokens, logprobs = draw(logits, given, sizes)
    expected, expected_logprobs = sample_ref(logits, *given)
    assert tokens.tolist() == expected.tolist()
    assert torch.allclose(logprobs, expected_logprobs, atol=1e-5, rtol=1e-6)


def test_ties_are_cut_by_id_across_ranks():
    """Of ten equal tokens, ranked by id, top-k 5 and top-p 0.45 keep the first five; a grid of numbers finds them."""
    grid = [(i + 0.5) / 20 for i in range(20)]
    for top_k, top_p in ((5, 1.0), (0, 0.45), (7, 0.65)):
        given = rows([1.0] * 20, [top_k] * 20, [top_p] * 20, [0.0] * 20, grid)
        tokens, _ = draw(torch.zeros(20, 10), given, (3, 0, 4, 3))
        assert tokens.tolist() == [i // 4 for i in range(20)]


def test_greedy_tells_apart_what_fp32_weights_cannot():
    logits = torch.zeros(2, 6)
    logits[0, 4] = 1e-8  # exp(-1e-8) rounds to 1
    tokens, _ = draw(logits, rows([0.0] * 2, [0, 3], [1.0] * 2, [0.0] * 2, [0.9] * 2), (2, 4))
    assert tokens.tolist() == [4, 0]


def test_the_largest_uniform_number_never_reaches_an_impossible_token():
    logits = torch.full((300, 901), -torch.inf)
    logits[:, 5:400:7] = randn(300, len(range(5, 400, 7)), seed=0)
    given = rows([1.0] * 300, [0, 10, 10**6] * 100, [1.0] * 300, [0.0] * 300, [1 - 2**-53] * 300)
    tokens, logprobs = draw(logits, given, (100, 200, 300, 301))
    assert logits.gather(1, tokens[:, None]).isfinite().all() and logprobs.isfinite().all()


def test_what_a_draw_costs():
    """The table at the head of vocab_parallel.py. Nothing grows with the vocabulary."""

    def cost(top_k, top_p, temperature=1.0, num=8, sizes=(400, 100)):
        given = rows([temperature] * num, [top_k] * num, [top_p] * num, [0.1] * num, [0.5] * num)
        logits = randn(num, sum(sizes), seed=0)

        def work(shard):
            vocab_parallel.sample(part(logits, shard), part(logits, shard), *given, shard)
            return shard.calls

        calls, *others = on_ranks(sizes, work)
        assert all(other == calls for other in others)
        return len(calls), sum(size for _, size in calls) / num

    assert cost(0, 1.0) == cost(5, 0.5, temperature=0.0) == (3, 48)
    assert cost(5, 1.0) == cost(5, 1.0, sizes=(9000, 1)) == (3 + 6, 48 + 2584)
    assert cost(0, 0.5) == (3 + 7, 48 + 2592)
    assert cost(5, 0.5) == (3 + 6 + 7, 48 + 2584 + 2592)

    def work(shard):
        sampling.top_logprobs(torch.zeros(shard.size), 5, shard)
        return shard.calls

    assert on_ranks((4, 100), work) == [[("gather", 24 * 5)]] * 2


def changed_sequences(num, vocab):
    """Sequences with some output and every penalty and mask, alone and together; (sequences, their end tokens)."""
    choices = [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.0, "presence_penalty": -0.5},
        {"allowed_token_ids": (3, vocab // 2, vocab // 2 + 1, vocab - 1)},
        {"min_tokens": 50},
        {"repetition_penalty": 0.5, "frequency_penalty": 2.0, "min_tokens": 50, "allowed_token_ids": tuple(range(40))},
        {},
    ]
    seqs, ends = [], []
    ids = torch.randint(vocab, (num, 30), generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(num):
        cut = {"temperature": (0, 0.8)[i % 2], "top_k": (0, 9)[i % 3 == 0], "logprobs": 3, "max_tokens": 60}
        seq = Sequence(Request(f"r{i}", tuple(ids[i][:10]), SamplingParams(**cut, **choices[i % len(choices)])), 0, i)
        seq.token_ids += ids[i][10:] * (i % 4 > 0)
        seqs.append(seq)
        ends.append(frozenset(range(0, vocab, 2)))
    return seqs, ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_penalties_and_masks(dtype):
    sizes = (60, 0, 41)
    logits = (randn(280, sum(sizes), seed=2) * 2).to(dtype)
    untouched = logits.clone()
    seqs, ends = changed_sequences(280, sum(sizes))
    keys = [sampling.stream_key(0, seq.request.id, 0) for seq in seqs]
    expected, expected_logprobs = sampling.draw(logits, seqs, keys, ends)
    for tokens, logprobs in on_ranks(sizes, lambda s: sampling.draw(part(logits, s), seqs, keys, ends, s)):
        assert tokens.tolist() == expected.tolist()
        assert torch.allclose(logprobs, expected_logprobs, atol=1e-5)
    assert torch.equal(logits, untouched)
    assert (expected != logits.argmax(-1)).float().mean() > 0.5, "the changes must matter"


@pytest.mark.parametrize("k", [0, 1, 5, 50, 1000])
def test_top_logprobs(k):
    sizes = (60, 0, 3, 41)
    row = (randn(sum(sizes), seed=3) * 4).round() / 4
    row[10:90] = row[10:90].clamp(max=0)  # many ties
    expected = sampling.top_logprobs(row, k)
    ranking = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
    assert [i for i, _ in expected] == ranking[:k]
    assert torch.allclose(torch.tensor([v for _, v in expected]), row.log_softmax(-1)[ranking[:k]], atol=1e-5)
    for got in on_ranks(sizes, lambda s: sampling.top_logprobs(part(row, s), k, s)):
        assert [i for i, _ in got] == ranking[:k]
        assert [v for _, v in got] == pytest.approx([v for _, v in expected], abs=1e-5)


def test_log_probabilities_of_given_tokens():
    sizes, ids = (60, 0, 41), torch.tensor([[0, 59], [60, 100], [7, 7]])
    logits = randn(3, sum(sizes), seed=4) * 3
    expected = logits.log_softmax(-1).gather(1, ids)
    assert torch.allclose(sampling.token_logprobs(logits, ids), expected, atol=1e-5)

    def work(shard):
        return sampling.token_logprobs(part(logits, shard), ids, shard), shard.calls

    for found, calls in on_ranks(sizes, work):
        assert torch.allclose(found, expected, atol=1e-5)
        assert calls == [("max_", 3 * 2 * 4), ("gather", 3 * 4)]


def two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shard = ProcessShard((300, 233), rank)
    logits, given = randn(100, shard.total, seed=0) * 3, parameters(100, seed=0)
    result = vocab_parallel.sample(part(logits, shard), part(logits, shard), *given, shard)
    top = sampling.top_logprobs(part(logits[0], shard), 7, shard)
    torch.save((*result, top), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    logits = randn(100, 533, seed=0) * 3
    expected, expected_logprobs = sample_ref(logits, *parameters(100, seed=0))
    for rank in range(2):
        tokens, logprobs, top = torch.load(tmp_path / f"{rank}.pt")
        assert tokens.tolist() == expected.tolist()
        assert torch.allclose(logprobs, expected_logprobs, atol=1e-5)
        assert [i for i, _ in top] == logits[0].topk(7).indices.tolist()
