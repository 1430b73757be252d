"""The ranks of a run as a mesh of replicas × shards, and how they talk.

Rank 0 leads: it alone reads and writes files and decides what is done. The others follow: they wait for its next
command and take their part in it. rank = replica · shard + shard_rank, so that the ranks of one replica, which talk
twice a layer, are neighbours on one machine.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from isheep import ranks
from isheep.watch import Watch

FOREVER = timedelta(days=30)  # a follower waits for a leader who may be busy with files; ranks.Watch ends a dead wait


@dataclass(frozen=True)
class Mesh:
    """`shard` ranks hold one copy of the weights; there are `replicate` copies. One rank alone has no groups at all."""

    shard: int = 1
    replicate: int = 1
    rank: int = 0
    devices: DeviceMesh | None = field(default=None, compare=False)  # dimensions "replicate" and "shard"
    control: Any = field(default=None, compare=False)  # gloo group of all ranks, for objects and the leader's commands
    heads: Any = field(default=None, compare=False)  # gloo group of the first rank of every replica
    watch: Watch | None = field(default=None, compare=False)  # ends a run that waits for a rank that does not come

    @classmethod
    def of_this_process(cls, shard: int, replicate: int, device: str, watch: Watch | None = None) -> "Mesh":
        """The mesh of an initialised process group of shard · replicate ranks; every rank must make it."""
        size, rank = dist.get_world_size(), dist.get_rank()
        assert size == shard * replicate, f"{size} ranks are no mesh of {replicate} × {shard}"
        devices = init_device_mesh(device, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        control = dist.new_group(backend="gloo", timeout=FOREVER)
        heads = dist.new_group(list(range(0, size, shard)), backend="gloo", timeout=FOREVER)
        return cls(shard, replicate, rank, devices, control, heads, watch)

    @classmethod
    def join(cls, timeout_s: float, shape: tuple[int, int, str] | None = None) -> "Mesh":
        """Meet the other ranks. The leader knows the shape, (shard, replicate, device type), and tells the rest."""
        watch, box = ranks.init(timeout_s), [shape]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        assert box[0] is not None, "the leader gives no shape"
        return cls.of_this_process(*box[0], watch)

    @property
    def size(self) -> int:
        return self.shard * self.replicate

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def shard_rank(self) -> int:
        return self.rank % self.shard

    @property
    def replica(self) -> int:
        return self.rank // self.shard

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that hold this rank's copy of the weights."""
        assert self.devices is not None
        return self.devices.get_group("shard")

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of one type over all ranks, in place, in one collective."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            with self.together():
                dist.all_reduce(flat)
            for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.least(0)

    def least(self, value: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.int64)
        with self.together():
            dist.all_reduce(number, dist.ReduceOp.MIN, group=self.control)
        return int(number)

    def enter(self, stage: str) -> None:
        """What the leader does now, for the message in which a rank's failure is told."""
        if self.watch is not None:
            self.watch.enter(stage)

    def command(self, name: str, /, **payload: Any) -> None:
        """Tell the followers what is done next; cli.py has their loop."""
        self.share((name, payload))

    def share(self, value: Any = None) -> Any:
        """The leader's object, on every rank. What the others pass does not matter."""
        box = [value]
        if self.size > 1:
            with self.watch.idle() if self.watch and not self.leads else self.together():
                dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's object, in order of rank, for the leader; an empty list for the others."""
        return self._gather(value, self.control, self.size)

    def collect_replicas(self, value: Any) -> list[Any]:
        """The object of each replica's first rank for the leader; an empty list for the others."""
        return [] if self.shard_rank else self._gather(value, self.heads, self.replicate)

    def _gather(self, value: Any, group: Any, size: int) -> list[Any]:
        if size == 1:
            return [value] if self.leads else []
        found: list[Any] | None = [None] * size if self.leads else None
        with self.together():
            dist.gather_object(value, found, dst=0, group=group)
        return found or []

    def together(self) -> AbstractContextManager[None]:
        """Around what ranks do in step: the watch ends a run in which one of them does not get on."""
        return self.watch.collective() if self.watch else nullcontext()

    def watch_layers(self, layers: Iterable[nn.Module]) -> None:
        """Tell the watch of each layer that is begun: a pass may take as long as it likes, a layer not."""
        if self.watch is not None:
            watch = self.watch
            for layer in layers:
                layer.register_forward_pre_hook(lambda *_: watch.progress(), prepend=True)


ALONE = Mesh()
