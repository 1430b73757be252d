"""Runs a Gluon kernel on the CPU, as Triton's interpreter runs Triton's: partitions as threads, one at a time.

    kernels = interpret(monkeypatch, module, seed=0)

What is asynchronous on the chip happens as late as it may, or as early: a TMA copy arrives at any moment after its
issue, a warpgroup product reads its operands at its issue or when it is waited for. Who runs next is decided by
priorities that are drawn, and drawn again now and then, so that some threads run far ahead of others. Shared memory
begins as NaN, an element of an output may be written once. So a missing wait, a slot that is given back too soon, a
barrier with the wrong phase or count shows as a wrong number, a deadlock or an error, for some seed. Layouts mean
nothing here: the compiler checks them.
"""

import contextlib
import random
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon import language as real

PRODUCT_ROWS = 64  # of a warpgroup's product


class Deadlock(Exception):
    pass


class Stopped(Exception):
    """Another thread has failed."""


class Warps:
    """A thread that runs one partition of one program, when it is its turn."""

    def __init__(self, program: int) -> None:
        self.program, self.turn = program, threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done, self.priority = False, 0.0
        self.products: list[Product] = []  # in flight, oldest first


class Copy:
    """A TMA copy on its way."""

    def __init__(self, arrive: Callable[[], None], priority: float) -> None:
        self.arrive, self.priority = arrive, priority


class Chip:
    """Programs and their warps. `copies` are TMA copies on their way."""

    def __init__(self, seed: int, num_programs: int) -> None:
        self.random, self.num_programs = random.Random(seed), num_programs
        self.warps: list[Warps] = []
        self.copies: list[Copy] = []
        self.written: dict[int, Tensor] = {}  # by address of an output: which elements
        self.now: Warps | None = None
        self.error: BaseException | None = None
        self.all_done = threading.Event()

    def start(self, program: int, function: Callable, args: tuple) -> Warps:
        warps = Warps(program)
        warps.priority = self.random.random()
        self.warps.append(warps)

        @torch.no_grad()
        def body() -> None:
            warps.turn.acquire()
            try:
                if self.error is None:
                    function(*args)
                    if warps.products:
                        raise AssertionError("a partition ended with products in flight")
            except BaseException as error:
                self.error = self.error or error
            warps.done = True
            self.pass_on()

        threading.Thread(target=body, daemon=True).start()
        return warps

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, until it is drawn again with `ready` true."""
        me = self.now
        assert me is not None
        me.ready = ready
        self.pass_on()
        me.turn.acquire()
        if self.error is not None:
            raise Stopped

    def pass_on(self) -> None:
        while self.error is None:
            able = [*(w for w in self.warps if not w.done and w.ready()), *self.copies]
            if able:
                if self.random.random() < 0.1:
                    self.random.choice(able).priority = self.random.random()
                first = max(able, key=lambda x: x.priority)
                if isinstance(first, Copy):
                    self.copies.remove(first)
                    first.arrive()
                    continue
                self.now = first
                first.turn.release()
                return
            if all(w.done for w in self.warps):
                break
            self.error = Deadlock(f"{sum(not w.done for w in self.warps)} partitions wait for each other")
        for warps in self.warps:
            warps.turn.release()
        if all(w.done for w in self.warps):
            self.all_done.set()


chip = Chip(0, 0)  # the one that runs


class Barrier:
    """An mbarrier: `completed` phases; the running one ends when all have arrived and all bytes are there."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.completed = 0

    def add(self, arrivals: int, num_bytes: int) -> None:
        self.missing, self.bytes = self.missing - arrivals, self.bytes + num_bytes
        if self.missing < 0:
            raise AssertionError(f"more arrivals at a barrier than the {self.count} of a phase")
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.completed = self.count, self.completed + 1


class mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(bar: "Shared", count: int) -> None:
        bar.barrier.count = bar.barrier.missing = count

    @staticmethod
    def expect(bar: "Shared", num_bytes: int) -> None:
        bar.barrier.add(1, int(num_bytes))

    @staticmethod
    def arrive(bar: "Shared", count: int = 1) -> None:
        bar.barrier.add(count, 0)
        chip.wait()

    @staticmethod
    def wait(bar: "Shared", phase: int) -> None:
        parity, barrier = int(phase), bar.barrier
        assert barrier.count, "a barrier is waited for that was never initialised"
        chip.wait(lambda: barrier.completed % 2 != parity)


class Shared:
    """Shared memory or a part of it: `data`, or barriers. `fresh` holds what was stored and not yet fenced."""

    def __init__(self, data: Tensor, barriers: list[Barrier], fresh: set[int]) -> None:
        self.data, self.barriers, self.fresh = data, barriers, fresh

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def barrier(self) -> Barrier:
        (barrier,) = self.barriers
        return barrier

    def index(self, i: Any) -> "Shared":
        assert 0 <= int(i) < len(self.data), "past the end of shared memory"
        return Shared(self.data[int(i)], self.barriers[int(i) : int(i) + 1], self.fresh)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order), self.barriers, self.fresh)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.data.narrow(dim, int(start), length), self.barriers, self.fresh)

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.data.copy_(value.expand(self.data.shape))
        self.fresh.add(id(chip.now))

    def read_asynchronously(self) -> Tensor:
        assert not self.fresh, "a product or copy reads what was stored without a fence"
        return self.data


ALLOCATED: list[Shared] = []


def fence_async_shared() -> None:
    for shared in ALLOCATED:
        shared.fresh.discard(id(chip.now))


class Product:
    """A warpgroup product, computed when it is waited for; it has read its operands before, or reads them then."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands, self.acc, self.value = (a, b), acc if use_acc else None, None
        shapes = list(a.shape), b.shape, list(acc.shape)
        (m, k), (k2, n), out = shapes
        assert m == PRODUCT_ROWS and k == k2 and out == [m, n], f"a product of shapes {shapes}"
        assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
        if chip.random.random() < 0.5:
            self.operands = tuple(_read(x).clone() for x in self.operands)

    @property
    def shape(self) -> list[int]:
        return [PRODUCT_ROWS, int(self.operands[1].shape[1])]

    def finish(self) -> None:
        a, b = map(_read, self.operands)
        before = self.acc.value if isinstance(self.acc, Product) else self.acc
        product = a.float() @ b.float()
        self.value = product if before is None else before + product


def _read(x: Any) -> Tensor:
    return x.read_asynchronously() if isinstance(x, Shared) else x


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    assert chip.now is not None
    chip.now.products.append(product)
    chip.wait()
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    chip.wait()
    assert chip.now is not None
    queue = chip.now.products
    while len(queue) > num_outstanding:
        queue.pop(0).finish()
    # What is still in flight can be added to by the next product, and nothing else.
    values = [dep.value if isinstance(dep, Product) and dep.value is not None else dep for dep in deps]
    return values[0] if len(values) == 1 else tuple(values)


def copy_in(desc: Any, coord: list, barrier: Shared, result: Shared) -> None:
    """Rows and columns of a tensor to shared memory, zeros outside of it, at some moment from now on."""
    (row, column), block = (int(c) for c in coord), list(desc.block_shape)
    assert result.shape == block and not result.fresh

    def arrive() -> None:
        rows, columns = row + torch.arange(block[0]), column + torch.arange(block[1])
        inside = ((rows >= 0) & (rows < desc.shape[0]))[:, None] & ((columns >= 0) & (columns < desc.shape[1]))
        source = desc.base.as_strided(desc.shape, desc.strides)
        values = source[rows.clamp(0, desc.shape[0] - 1)][:, columns.clamp(0, desc.shape[1] - 1)]
        result.data.copy_(torch.where(inside, values, 0))
        barrier.barrier.add(0, -result.data.numel() * result.data.element_size())

    chip.copies.append(Copy(arrive, chip.random.random()))
    chip.wait()


class Descriptor:
    """A TensorDescriptor as a kernel sees it."""

    def __init__(self, desc: Any) -> None:
        self.base, self.shape, self.strides, self.block_shape = desc.base, desc.shape, desc.strides, desc.block_shape
        self.layout, self.dtype = desc.layout, desc.base.dtype


class Pointer:
    """Elements of a tensor, by offset from its first."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask, of one shape. IndexError where one that counts is outside of the tensor."""
        offset, mask = torch.broadcast_tensors(
            torch.as_tensor(self.offset), torch.as_tensor(True if mask is None else mask)
        )
        inside = (offset >= 0) & (offset < self.tensor.numel())
        if (mask & ~inside).any():
            raise IndexError("an access outside of its tensor")
        return offset.clamp(0, max(0, self.tensor.numel() - 1)).long(), mask


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    at, mask = pointer.places(mask)
    return torch.where(mask, pointer.tensor.view(-1)[at], torch.as_tensor(other, dtype=pointer.tensor.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    at, mask = pointer.places(mask)
    flat, value = pointer.tensor.view(-1), torch.as_tensor(value).expand(at.shape)
    written = chip.written.setdefault(flat.data_ptr(), torch.zeros(flat.shape, dtype=torch.bool))
    assert not written[at[mask]].any(), "an element of an output is written twice"
    written[at[mask]] = True
    flat[at[mask]] = value[mask].to(flat.dtype)


def _atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: str = "") -> Tensor:
    at, mask = pointer.places(mask)
    flat, value = pointer.tensor.view(-1), torch.as_tensor(value).expand(at.shape)
    before = flat[at].clone()
    flat.index_add_(0, at[mask], value[mask].to(flat.dtype))
    return before


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    fill = torch.nan if dtype.is_floating_point else -1
    shared = Shared(torch.full(shape, fill, dtype=dtype), [Barrier() for _ in range(shape[0])], set())
    ALLOCATED.append(shared)
    return shared


def _warp_specialize(partitions: list, num_warps: list[int], num_regs: list[int]) -> None:
    assert len(partitions) == len(num_warps) + 1 == len(num_regs) + 1 and chip.now is not None
    started = [chip.start(chip.now.program, *partition) for partition in partitions]
    chip.wait(lambda: all(warps.done for warps in started))


class Language:
    """`gl`, on torch. Scalars of a launch are tensors without dimensions; torch, unlike the chip, gives an int32 vector
    and an int64 scalar an int32 sum."""

    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    allocate_shared_memory = staticmethod(_allocate)
    warp_specialize = staticmethod(_warp_specialize)
    load, store, atomic_add = staticmethod(_load), staticmethod(_store), staticmethod(_atomic_add)
    static_range = range
    exp2, log2 = torch.exp2, torch.log2
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    arange = staticmethod(lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32))
    full = staticmethod(lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype))
    zeros = staticmethod(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype))
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    maximum = torch.maximum
    minimum = staticmethod(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    where = staticmethod(lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b))
    convert_layout = staticmethod(lambda x, layout: x)
    program_id = staticmethod(lambda axis: torch.tensor(chip.now.program, dtype=torch.int32))  # type: ignore[union-attr]
    num_programs = staticmethod(lambda axis: torch.tensor(chip.num_programs, dtype=torch.int32))

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)  # layouts, constexpr


STAND_INS = {
    "gl": Language(),
    "tl": Language(),
    "mbarrier": mbarrier,
    "copy_in": copy_in,
    "fence_async_shared": fence_async_shared,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}


def _python(function: types.FunctionType, known: dict[types.FunctionType, types.FunctionType]) -> types.FunctionType:
    """The function with stand-ins for all that it names: Gluon's and Triton's words, and kernels that it calls."""
    if function not in known:
        names: dict[str, Any] = {}
        known[function] = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
        for name, value in function.__globals__.items():
            if name in STAND_INS:
                names[name] = STAND_INS[name]
            elif isinstance(getattr(value, "fn", None), types.FunctionType):
                names[name] = _python(value.fn, known)
            else:
                names[name] = getattr(value, "value", value)  # of a constexpr
    return known[function]


class Interpreted:
    """In place of a kernel: launched as it is, `kernel[grid](...)`."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.function, self.seed, self.launches = kernel.fn, seed, 0

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*args: Any, **kwargs: Any) -> None:
            global chip
            self.launches += 1
            code, fixed = self.function.__code__, self.function.__annotations__
            named = kwargs | dict(zip(code.co_varnames, args))
            names = code.co_varnames[: code.co_argcount]
            given = tuple(named[name] if name in fixed else _given(named[name]) for name in names)
            chip = Chip(self.seed, grid[0])
            with one_thread():
                for program in range(grid[0]):
                    chip.start(program, _python(self.function, {}), given)
                chip.pass_on()
                chip.all_done.wait()
            ALLOCATED.clear()
            if chip.error is not None:
                raise chip.error

        return launch


def interpret(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, seed: int) -> dict[str, Interpreted]:
    """Replace the kernels of a module by what runs here; a kernel's name ends in "_kernel"."""
    kernels = {name: Interpreted(kernel, seed) for name, kernel in vars(module).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(module, name, kernel)
    return kernels


def _given(value: Any) -> Any:
    """A launch's argument, not a constexpr, as the kernel gets it."""
    if isinstance(value, Tensor):
        return Pointer(value)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    return Descriptor(value) if hasattr(value, "block_shape") else value


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
