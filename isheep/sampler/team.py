"""Sampling on a mesh: every replica runs a Sampler, and all its ranks the same one in step.

The ranks of a replica schedule alike and draw alike, for both follow from the requests alone; nothing is told between
them but sums and candidates of the forward pass. The leader gives each new request to the replica with the least to do.
All replicas meet every few steps: requests go out, completions come in.
"""

from collections.abc import Iterable, Iterator

from isheep.cli import Opened
from isheep.config import SamplerConfig, UserError
from isheep.mesh import Mesh
from isheep.model.parallel import sampling_view
from isheep.model.transformer import Transformer
from isheep.sampler.engine import Sampler, Stats, num_cache_blocks
from isheep.sampler.request import Completion, Request
from isheep.text.tokenizer import Tokenizer

STEPS = 8  # between two meetings: a meeting costs about a millisecond, a step some tens of them
ABORT = "abort"


def start_sampler(
    model: Transformer, tokenizer: Tokenizer, cfg: SamplerConfig, seed: int, eos_token_ids: Iterable[int], mesh: Mesh
) -> "Sampler | Team":
    """The sampler of a run: one process's own or, on a mesh, the team's, whose followers are told to join."""
    if mesh.size == 1:
        return Sampler(model, tokenizer, cfg, seed, eos_token_ids)
    eos = tuple(eos_token_ids)
    mesh.command("sample", cfg=cfg, seed=seed, eos_token_ids=eos)
    return Team(model, tokenizer, cfg, seed, eos, mesh)


def follow(opened: Opened, mesh: Mesh, cfg: SamplerConfig, seed: int, eos_token_ids: tuple[int, ...]) -> None:
    """A follower's part in a team, until its leader closes it."""
    Team(opened.model, opened.tokenizer, cfg, seed, eos_token_ids, mesh).follow()


class Team:
    """Used by the leader as a `Sampler` is; each follower has one too and calls `follow`."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        cfg: SamplerConfig,
        seed: int,
        eos_token_ids: tuple[int, ...],
        mesh: Mesh,
    ) -> None:
        self.cfg, self.mesh = cfg, mesh
        view = sampling_view(model, mesh)
        num_blocks = mesh.least(num_cache_blocks(view, cfg))
        self.sampler = Sampler(view, tokenizer, cfg, seed, eos_token_ids, num_blocks)
        self.stats = Stats()
        self._load = [0] * mesh.replicate  # tokens that each replica may still have to compute
        self._num_seqs = [0] * mesh.replicate
        self._flying: dict[str, tuple[int, int, Request]] = {}  # id -> replica, samples that are not back, request

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `Sampler.stream`: completions as they finish, requests pulled as there is room."""
        source, pending = iter(requests), True
        try:
            while pending or self._flying:
                new: list[tuple[int, Request]] = []
                while pending and min(self._num_seqs) < 2 * self.cfg.max_num_seqs:  # as many waiting as running
                    request = next(source, None)
                    if request is None:
                        pending = False
                    else:
                        new.append((self._assign(request), request))
                if self._flying:
                    yield from self._meet(self.mesh.share(new))
        finally:
            self.mesh.share(ABORT)
            self._abort()

    def follow(self) -> None:
        """Do what the leader shares until it closes the team."""
        while (message := self.mesh.share()) is not None:
            self._abort() if message == ABORT else self._meet(message)
        self.sampler.close()

    def close(self) -> None:
        """Free all caches; the followers wait for the next command."""
        self.mesh.share(None)
        self.sampler.close()

    def _assign(self, request: Request) -> int:
        """The replica that serves the request; UserError where none could."""
        if request.id in self._flying:
            raise UserError(f'Two requests have the id "{request.id}" at the same time; give each its own.')
        self.sampler.check(request)
        replica = min(range(self.mesh.replicate), key=self._load.__getitem__)
        self._flying[request.id] = (replica, request.params.n, request)
        self._count(replica, request, request.params.n)
        return replica

    def _count(self, replica: int, request: Request, num_samples: int) -> None:
        """That many samples of the request are new to the replica, or back from it where negative."""
        self._num_seqs[replica] += num_samples
        self._load[replica] += num_samples * (len(request.prompt_token_ids) + request.params.max_tokens)

    def _meet(self, new: list[tuple[int, Request]]) -> list[Completion]:
        """Take the requests of this replica, make some steps, and give the leader what all replicas have finished."""
        for replica, request in new:
            if replica == self.mesh.replica:
                self.sampler.add(request)
        done: list[Completion] = []
        for _ in range(STEPS):
            if self.sampler.has_work:
                with self.mesh.together():
                    done += self.sampler.step()
        parts = self.mesh.collect_replicas((done, self.sampler.stats))
        if parts:
            self.stats = Stats.together([stats for _, stats in parts])
        completions = [completion for part, _ in parts for completion in part]
        for completion in completions:
            replica, num_left, request = self._flying.pop(completion.id)
            self._count(replica, request, -1)
            if num_left > 1:
                self._flying[completion.id] = (replica, num_left - 1, request)
        return completions

    def _abort(self) -> None:
        self.sampler.abort()
        self._flying.clear()
        self._load, self._num_seqs = [0] * self.mesh.replicate, [0] * self.mesh.replicate
