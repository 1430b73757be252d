"""A run in progress: the model, its sampler, and the clock, as the algorithm in iterate.py uses them.

The sampler is made when the first request comes and dropped before training, so a stage that finds its result on disk
costs nothing, and the cache is never in the trainer's way. Base weights stay where they are throughout.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from isheep.alarms import Alarms
from isheep.artifacts import sha256_file
from isheep.cli import Opened
from isheep.config import RunConfig
from isheep.log import Events, log
from isheep.model.parallel import withdraw_adapter
from isheep.sampler.engine import Sampler, Stats
from isheep.sampler.request import Completion, Request
from isheep.sampler.store import Store
from isheep.sampler.team import Team, start_sampler
from isheep.stages import Iteration
from isheep.summary import stage_counts
from isheep.text.templates import template


class Session:
    """`seeds` is the file of seed tasks. `cfg.iterations` and `cfg.template` are resolved.

    `others` are folders of runs whose results are taken where they are the same, `store` has completions of theirs.
    """

    def __init__(
        self, cfg: RunConfig, opened: Opened, seeds: Path, others: Sequence[Path] = (), store: Store | None = None
    ) -> None:
        self.cfg, self.seeds, self.out = cfg, seeds, Path(cfg.out)
        self.model, self.tokenizer, self.template = opened.model, opened.tokenizer, opened.template
        self.mesh, self.others, self.store = opened.mesh, others, store
        self.events = Events(self.out / "events.jsonl")
        self.alarms = Alarms(self.out, cfg.alarm, self.events)
        self._sampler: Sampler | Team | None = None

    @property
    def num_iterations(self) -> int:
        assert self.cfg.iterations is not None, "not resolved"
        return self.cfg.iterations

    def iteration(self, number: int) -> Iteration:
        """Iteration `number`: the base model works in the first, the adapter trained before it in each other."""
        before = self.out / f"iter{number - 1}"
        first = number == 1
        return Iteration(
            number=number,
            folder=self.out / f"iter{number}",
            seed=self.cfg.seed,
            model=self.cfg.model,
            dtype=self.cfg.dtype,
            context_len=self.model.config.context_len,
            template=template("raw") if first else self.template,
            adapter=None if first else before.name,
            adapter_folder=None if first else before / "adapter",
            paper_joins=self.cfg.paper_joins,
            others=tuple(out / f"iter{number}" for out in self.others),
        )

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish; see `Sampler.stream`."""
        if self.store is None:
            yield from self._sample(requests)
        else:
            yield from self.store.stream(requests, self._sample, self.cfg.seed, self._adapter_digest)

    def _sample(self, requests: Iterable[Request]) -> Iterator[Completion]:
        if self._sampler is None:
            ends = self.template.stop_token_ids(self.tokenizer)
            cfg = self.cfg
            self._sampler = start_sampler(self.model, self.tokenizer, cfg.sampler, cfg.seed, ends, self.mesh)
        yield from self._sampler.stream(requests)

    def _adapter_digest(self, name: str) -> str:
        """Of an adapter of this run, which is named after its iteration."""
        return sha256_file(self.out / name / "adapter" / "adapter_model.safetensors")

    def free_cache(self) -> None:
        """Drop the sampler's key/value cache; the next request makes a new one."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def close(self) -> None:
        """Leave the model as it was opened, for the next session."""
        self.free_cache()
        for name in list(self.model.adapters):
            withdraw_adapter(self.model, name, self.mesh)

    @contextmanager
    def stage(self, it: Iteration, name: str) -> Iterator[None]:
        """Around one stage: its start, its end and what it took go to events.jsonl, also when it is stopped."""
        where = {"iteration": it.number, "stage": name}
        self.mesh.enter(f"{name} of iteration {it.number}")
        self.events.write("stage started", **where)
        started, before, status = time.monotonic(), self._num_tokens(), "stopped"
        try:
            yield
            status = "finished"
        finally:
            seconds = round(time.monotonic() - started, 3)
            taken = {key: n - before.get(key, 0) for key, n in self._num_tokens().items()}
            counts = stage_counts(it.folder, name) if status == "finished" else {}
            self.events.write(f"stage {status}", **where, seconds=seconds, **taken, counts=counts)
        kept = f", {counts['kept']} kept" if "kept" in counts else ""
        log.info("%s %s done in %.1f s%s", it.name, name, seconds, kept)

    def _num_tokens(self) -> dict[str, int]:
        """What the sampler has computed so far."""
        stats = self._sampler.stats if self._sampler is not None else Stats()
        names = ("num_prefill_tokens", "num_cached_tokens", "num_decode_tokens")
        return {name: getattr(stats, name) for name in names}
