"""CUDA graphs without CUDA: what a capture records, a replay does again, to the same tensors, with the same numbers.

It is as strict as the real thing, or stricter. While capturing nothing is computed, nothing may be asked of a tensor,
and no kernel may be launched that has not been compiled by a launch before. Between two replays everything that any
graph of a pool has made is garbage. A graph keeps nothing alive that it did not make, and a replay that uses what is
gone is refused. When a graph is dropped, all others of its stream are of no more use, as they share what cuBLAS works
in, and a pool whose graphs are all gone is gone. A capture that fails leaves its stream the current one.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")  # a number from the device, or one to it
GARBAGE = {torch.int64: 2**40, torch.int32: 2**30, torch.bool: True}


class Graph:
    """What `torch.cuda.CUDAGraph` is to the code under test."""

    def __init__(self, cuda: "Cuda") -> None:
        self.cuda = cuda
        self.calls: list[tuple[str, Callable[[], None]]] = []  # a name, and how it is done again
        self.made: Pool = Pool()
        self.stream: object = None
        self.works = True

    def record(self, name: str, call: Callable, args: tuple, kwargs: dict) -> None:
        made = {address(x) for x in self.made}

        def lent(x: Any) -> Any:
            return Lent(x) if isinstance(x, torch.Tensor) and address(x) not in made else x

        args, kwargs = tree_map(lent, (args, kwargs))
        self.calls.append((name, lambda: call(*taken(args), **taken(kwargs))))

    def pool(self) -> "Pool":
        return self.made

    def replay(self) -> None:
        assert self.works, "another graph of this stream was dropped"
        self.cuda.num_replays += 1
        spoil(self.made)
        for _, call in self.calls:
            call()

    def reset(self) -> None:
        for other in self.cuda.alive:
            other.works &= other.stream is not self.stream
        self.stream = object()  # what is left has no part in any

    __del__ = reset


class Lent:
    """A tensor that somebody else keeps alive, or not."""

    def __init__(self, x: torch.Tensor) -> None:
        self.storage, self.dtype = StorageWeakRef(x.untyped_storage()), x.dtype
        self.place = x.storage_offset(), x.shape, x.stride()

    def taken(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a tensor that this graph uses is gone"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


def taken(tree: Any) -> Any:
    return tree_map(lambda x: x.taken() if isinstance(x, Lent) else x, tree)


class Pool(list[torch.Tensor]):
    """What the graphs that share it have made."""


def spoil(tensors: list[torch.Tensor]) -> None:
    for x in tensors:
        x.fill_(torch.nan if x.is_floating_point() else GARBAGE[x.dtype])


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor)]


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """Records torch's operations and Triton's launches into a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(x.dtype == torch.bool for x in tensors_in(args[1]))
        assert name not in ASKS and not by_mask, f"{name} while capturing"
        if func._schema.is_mutable:
            self.graph.record(name, func, args, kwargs)
            return args[0]
        out = func(*args, **kwargs)
        inputs = {address(x) for x in tensors_in(args, kwargs)}
        made = [x for x in tensors_in(out) if address(x) not in inputs]  # others are views
        self.graph.made += made
        if made and not name.startswith(("empty", "new_empty")):
            assert made == [out], f"{name} has several results"

            self.graph.record(name, lambda *args, **kwargs: out.copy_(func(*args, **kwargs)), args, kwargs)
        spoil(made)
        return out


class Cuda:
    """The fake, in place of torch.cuda's functions.

    `captured` counts what each capture recorded, in order; `alive` are the graphs that are still held.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[Counter[str]] = []
        self.alive: WeakSet[Graph] = WeakSet()
        self.num_replays = 0
        self.current: object = None  # stream
        self._recorder: Recorder | None = None
        self._compiled: set[tuple] = set()
        self._launch = GridExecutor.__call__
        monkeypatch.setattr(GridExecutor, "__call__", lambda launch, *args, **kwargs: self._run(launch, args, kwargs))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self._recorder is not None)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        for name in ("tolist", "item", "cpu", "numpy", "__bool__"):  # on the host these read past torch's dispatcher
            monkeypatch.setattr(torch.Tensor, name, self._refused(name, getattr(torch.Tensor, name)))

    @contextmanager
    def on(self, stream: object):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def capture(self, graph: Graph, pool: Pool | None = None, stream: object = None):
        assert pool is None or any(pool is other.made for other in self.alive), "this pool is gone"
        self._recorder = Recorder(graph)
        graph.stream = stream
        before, self.current = self.current, stream
        try:
            with self._recorder:
                yield
        finally:
            self._recorder = None
        self.current = before
        if pool is not None:
            pool += graph.made
            graph.made = pool
        self.captured.append(Counter(name for name, _ in graph.calls))
        self.alive.add(graph)

    def _run(self, launch: GridExecutor, args: tuple, kwargs: dict) -> None:
        numbers = tuple((name, value) for name, value in kwargs.items() if not isinstance(value, torch.Tensor))
        kernel = launch.fn.__name__, numbers
        if self._recorder is None:
            self._compiled.add(kernel)
            self._launch(launch, *args, **kwargs)
        else:
            assert kernel in self._compiled, f"{kernel} would be compiled while capturing"
            self._recorder.graph.record(launch.fn.__name__, partial(self._launch, launch), args, kwargs)

    def _refused(self, name: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            assert self._recorder is None, f"Tensor.{name} while capturing"
            return method(*args, **kwargs)

        return call
