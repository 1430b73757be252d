"""Completions that several runs of one model share: what one of them has sampled, the others take.

A completion follows from its request, the run's seed and the numbers in the adapter alone. So a run that asks for more
of the same, more instructions or ratings of more pairs, samples only what is new to it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from itertools import chain
from pathlib import Path

from isheep.artifacts import Journal, canonical_json
from isheep.sampler.request import Completion, Request

Stream = Callable[[Iterable[Request]], Iterator[Completion]]


class Store:
    """A journal of completions in `path`.part that is never sealed. All runs have this model, dtype and template."""

    def __init__(self, path: Path, model: str, dtype: str, template: str) -> None:
        self._journal = Journal(path, {"model": model, "dtype": dtype, "template": template})

    def stream(
        self, requests: Iterable[Request], sample: Stream, seed: int, adapter_of: Callable[[str], str]
    ) -> Iterator[Completion]:
        """As `sample` does, which gets the requests that are new; `adapter_of` is a name's adapter, as a digest."""
        adapter_of = cache(adapter_of)
        keys: dict[str, str] = {}
        known: deque[Completion] = deque()

        def fresh() -> Iterator[Request]:
            for request in requests:
                if request.params.pool:  # vectors are kilobytes of text each: never kept, always sampled
                    yield request
                    continue
                key = _key(request, seed, adapter_of)
                if key in self._journal.done:
                    known.append(Completion(**self._journal.done[key][0]))
                else:
                    keys[request.id] = key
                    yield request

        new = fresh()
        first = next(new, None)  # so what is known comes before anything is sampled, and may be all that is wanted
        yield from _drain(known)
        if first is not None:
            with closing(sample(chain([first], new))) as completions:  # type: ignore[type-var]
                for completion in completions:
                    if completion.id in keys:
                        self._journal.append(keys.pop(completion.id), [completion.to_json()])
                    yield completion
                    yield from _drain(known)
        yield from _drain(known)

    def close(self) -> None:
        self._journal.close()


def _drain(known: deque[Completion]) -> Iterator[Completion]:
    while known:
        yield known.popleft()


def _key(request: Request, seed: int, adapter_of: Callable[[str], str]) -> str:
    """The request's id, for a reader, and a digest of all that its completion follows from besides the model."""
    assert request.params.n == 1, "one sample a request"
    adapter = None if request.adapter is None else adapter_of(request.adapter)
    parts = [seed, request.id, list(request.prompt_token_ids), asdict(request.params), adapter]
    return f"{request.id} {sha256(canonical_json(parts).encode()).hexdigest()[:32]}"
