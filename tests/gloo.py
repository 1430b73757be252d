"""Several ranks on one machine for tests: a function runs in forked processes joined by gloo."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from isheep.mesh import Mesh

LIMIT_S = 120


def run_ranks(function: Callable[..., Any], shard: int, replicate: int, *args: Any) -> list[Any]:
    """function(mesh, *args) on every rank of the mesh -> what each returned, in order of rank.

    Forked, not spawned: torch need not be imported again. An error in any rank is raised here with its traceback.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, shard, replicate, r, folder, results, args), daemon=True)
            for r in range(shard * replicate)
        ]
        for process in ranks:
            process.start()
        found: dict[int, Any] = {}
        try:
            while len(found) < len(ranks):
                rank, error, value = pickle.loads(results.get(timeout=LIMIT_S))
                if error is not None:
                    raise AssertionError(f"rank {rank}:\n{error}")
                found[rank] = value
        finally:
            for process in ranks:
                process.join(timeout=0 if len(found) < len(ranks) else 10)
                process.kill()
    return [found[rank] for rank in range(len(ranks))]


def _rank(
    function: Callable[..., Any], shard: int, replicate: int, rank: int, folder: str, results: Any, args: Any
) -> None:
    try:
        store = dist.FileStore(str(Path(folder) / "store"), shard * replicate)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=shard * replicate)
        value = function(Mesh.of_this_process(shard, replicate, "cpu"), *args)
        results.put(pickle.dumps((rank, None, value)))  # as bytes: tensors would go by shared memory and need us alive
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put(pickle.dumps((rank, traceback.format_exc(), None)))
