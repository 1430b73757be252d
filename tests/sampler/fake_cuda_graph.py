"""CUDA graphs without CUDA: what a capture records, a replay does again, to the same tensors, with the same numbers.

It is as strict as the real thing, or stricter. While capturing nothing is computed, nothing may be asked of a tensor,
and no kernel may be launched that has not been compiled by a launch before. Between two replays everything that any
graph of a pool has made is garbage. When a graph is dropped, all others of its stream are of no more use, as they share
what cuBLAS works in, and a pool whose graphs are all gone is gone.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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

    def pool(self) -> "Pool":
        return self.made

    def replay(self) -> None:
        assert self.works, "another graph of this stream was dropped"
        self.cuda.num_replays += 1
        spoil(self.made)
        for _, call in self.calls:
            call()

    def __del__(self) -> None:
        for other in self.cuda.alive:
            other.works &= other.stream is not self.stream


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
            self.graph.calls.append((name, partial(func, *args, **kwargs)))
            return args[0]
        out = func(*args, **kwargs)
        inputs = {address(x) for x in tensors_in(args, kwargs)}
        made = [x for x in tensors_in(out) if address(x) not in inputs]  # others are views
        self.graph.made += made
        if made and not name.startswith(("empty", "new_empty")):
            assert made == [out], f"{name} has several results"

            def again() -> None:
                out.copy_(func(*args, **kwargs))

            self.graph.calls.append((name, again))
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
        self._recorder: Recorder | None = None
        self._compiled: set[tuple] = set()
        self._launch = GridExecutor.__call__
        monkeypatch.setattr(GridExecutor, "__call__", lambda launch, *args, **kwargs: self._run(launch, args, kwargs))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        for name in ("tolist", "item", "cpu", "numpy", "__bool__"):  # on the host these read past torch's dispatcher
            monkeypatch.setattr(torch.Tensor, name, self._refused(name, getattr(torch.Tensor, name)))

    @contextmanager
    def capture(self, graph: Graph, pool: Pool | None = None, stream: object = None):
        assert pool is None or any(pool is other.made for other in self.alive), "this pool is gone"
        self._recorder = Recorder(graph)
        try:
            with self._recorder:
                yield
        finally:
            self._recorder = None
        if pool is not None:
            pool += graph.made
            graph.made = pool
        graph.stream = stream
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
            self._recorder.graph.calls.append((launch.fn.__name__, partial(self._launch, launch, *args, **kwargs)))

    def _refused(self, name: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            assert self._recorder is None, f"Tensor.{name} while capturing"
            return method(*args, **kwargs)

        return call
