"""The sampler: continuous batching over a paged cache, on the live weights of one model.

    sampler = Sampler(model, tokenizer)
    for completion in sampler.stream(requests): ...

Each step is one forward pass over the tokens the scheduler chose: prompts, parts of prompts and decodes together.
"""

import os
import time
from collections.abc import Hashable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from isheep import ranks
from isheep.config import SamplerConfig, UserError, did_you_mean
from isheep.model.batch import PackedBatch, PagedMeta
from isheep.model.transformer import KVCache, Transformer
from isheep.sampler import sampling
from isheep.sampler.block_manager import BlockManager
from isheep.sampler.graphs import SPARE_BLOCKS, Passes
from isheep.sampler.reading import Pools, read_prompts
from isheep.sampler.request import Completion, Request, Sequence
from isheep.sampler.scheduler import Chunk, Scheduler, Step
from isheep.text.tokenizer import Detokenizer, Tokenizer


@dataclass
class Stats:
    """What the sampler has done so far. `time_s` counts steps only, not what the caller does in between."""

    num_steps: int = 0
    num_prefill_tokens: int = 0  # prompt tokens computed
    num_cached_tokens: int = 0  # prompt tokens found in the cache instead
    num_decode_tokens: int = 0  # tokens drawn
    num_preempted: int = 0
    time_s: float = 0.0

    @classmethod
    def together(cls, parts: Seq["Stats"]) -> "Stats":
        """Of samplers that run side by side: tokens add up, steps and time are the longest."""
        longest = ("num_steps", "time_s")
        names = [field.name for field in fields(cls)]
        return cls(**{n: (max if n in longest else sum)([getattr(part, n) for part in parts]) for n in names})


class _Sample:
    """What the engine keeps about one running sequence besides its tokens."""

    def __init__(self, seq: Sequence, tokenizer: Tokenizer, seed: int, eos: frozenset[int]) -> None:
        params = seq.request.params
        special = {text: _special_id(tokenizer, text) for text in params.stop}  # a special token has no text to find
        self.stop_texts = tuple(text for text, token in special.items() if token is None)
        ids = frozenset(params.stop_token_ids) | {token for token in special.values() if token is not None}
        self.ends = ids if params.ignore_eos else ids | eos
        self.key = sampling.stream_key(seed if params.seed is None else params.seed, seq.request.id, seq.sample)
        self.text, self.searched = "", 0
        self.detokenizer = Detokenizer(tokenizer) if self.stop_texts else None
        self.logprobs: list[dict] | None = None if params.logprobs is None else []
        self.prompt_logprobs: dict[int, dict] | None = {} if params.num_prompt_logprobs else None  # by place

    def push(self, token: int) -> None:
        """Follow the text, where stop strings are looked for in it."""
        if self.detokenizer is not None:
            self.searched = max(0, len(self.text) - max(map(len, self.stop_texts)) + 1)
            self.text += self.detokenizer.push(token)

    def stops(self, token: int) -> bool:
        """Whether the sample ends with this token, its last; a stop string and what follows are cut from the text."""
        found = [at for at in (self.text.find(stop, self.searched) for stop in self.stop_texts) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found) or token in self.ends


class Sampler:
    """Generates from the model and its resident adapters. Base weights are read in place; only the cache is its own."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        cfg: SamplerConfig | None = None,
        seed: int = 0,
        eos_token_ids: Iterable[int] = (),
        num_blocks: int | None = None,
    ) -> None:
        """`eos_token_ids`, a template's stops say, end a sample as the checkpoint's own do, unless eos is ignored.

        `num_blocks` is the size of the cache, where several ranks have to agree on it; None: `num_cache_blocks`.
        """
        self.cfg = cfg = cfg or SamplerConfig()
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        own = {tokenizer.eos_token_id, *model.config.eos_token_ids, *eos_token_ids}
        self.eos = frozenset(token for token in own if token is not None)
        self.stats = Stats()
        num_blocks = num_blocks or num_cache_blocks(model, cfg)
        self._salts: dict[str | None, Hashable] = {None: None}
        self.scheduler = Scheduler(
            BlockManager(num_blocks, cfg.block_size, cfg.prefix_caching),
            cfg.max_num_seqs,
            cfg.max_num_batched_tokens,
            self._salts.__getitem__,
        )
        cache = model.new_kv_cache(num_blocks + SPARE_BLOCKS, cfg.block_size)
        self._passes: Passes | None = Passes(model, cache, cfg)
        self._samples: dict[tuple[str, int], _Sample] = {}
        self._pools = Pools(cfg.max_num_seqs, model.config.hidden_size, model.device)
        model.prepack(cfg.max_num_seqs)

    def close(self) -> None:
        """Free graphs, cache, pools and packed weights; the model is left as it was found."""
        if self._passes is not None:
            self._passes.close()
        self._passes = None
        self._pools = Pools(0, 0, self.model.device)  # for an `abort` that comes late
        self.model.unpack()

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """All completions, in the order of the requests and their samples."""
        requests = list(requests)
        place = {request.id: i for i, request in enumerate(requests)}
        return sorted(self.stream(requests), key=lambda c: (place[c.id], c.sample))

    def stream(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Requests are pulled as there is room; closing the iterator aborts what is left.

        Raises UserError for an unknown adapter, a repeated id or a prompt that cannot fit; the rest is then aborted.
        """
        source, pending = iter(requests), True
        try:
            while pending or self.has_work:
                while pending and self.scheduler.num_waiting < self.cfg.max_num_seqs:
                    request = next(source, None)
                    if request is None:
                        pending = False
                    else:
                        self.add(request)
                if self.has_work:
                    yield from self.step()
        finally:
            self.abort()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check(self, request: Request) -> None:
        """UserError where the request cannot be served: too long for context or cache, an unknown adapter or token."""
        context = self.model.config.context_len
        if len(request.prompt_token_ids) >= context:
            raise UserError(
                f'The prompt of request "{request.id}" has {len(request.prompt_token_ids)} tokens, but the model\'s '
                f"context ends at {context}: shorten it."
            )
        if request.adapter is not None and request.adapter not in self.model.adapters:
            raise UserError(
                f'Request "{request.id}" names the adapter "{request.adapter}", which is not loaded.'
                f"{did_you_mean(request.adapter, self.model.adapters)}"
            )
        vocab_size = self.model.vocab.total if self.model.vocab else self.model.config.vocab_size
        named = (*(request.params.allowed_token_ids or ()), *request.params.logprob_token_ids)
        unknown = [token for token in named if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(
                f'Request "{request.id}" names the token {unknown[0]}, but the model\'s ids end at {vocab_size - 1}.'
            )
        self.scheduler.check(self._within_context(request))

    def add(self, request: Request) -> None:
        """Queue a request; UserError as `check` says."""
        self.check(request)
        for seq in self.scheduler.add(self._within_context(request)):
            self._samples[seq.key] = _Sample(seq, self.tokenizer, self.seed, self.eos)

    def abort(self) -> None:
        """Drop all that is queued or running."""
        for request_id in dict.fromkeys(key[0] for key in self._samples):  # in order: the ranks of a mesh stay in step
            self.scheduler.abort(request_id)
        self._pools.forget(self._samples)
        self._samples.clear()

    def _within_context(self, request: Request) -> Request:
        """The request with no more max_tokens than the model's context has room for."""
        params, room = request.params, self.model.config.context_len - len(request.prompt_token_ids)
        if params.max_tokens <= room:
            return request
        return replace(request, params=replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room)))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """One forward pass -> the completions that it finished."""
        started = time.perf_counter()
        self._read_salts()
        step = self.scheduler.schedule()
        assert self._passes is not None, "the sampler is closed"
        self._passes.cache.copy_blocks(step.copies)
        chunks = sorted(step.chunks, key=lambda c: c.seq.request.adapter or "")  # one adapter's tokens lie together
        hidden = self._passes(self._batch(chunks), self._salts)
        for key, place, entry in read_prompts(self.model, chunks, hidden):
            cast(dict, self._samples[key].prompt_logprobs)[place] = entry
        self._pools.forget(seq.key for seq in step.preempted)
        self._pools.add(chunks, hidden)
        self._count(step)
        self.scheduler.update(step)
        ends = list(accumulate(chunk.num_tokens for chunk in chunks))
        rows = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        seqs = [chunk.seq for chunk in chunks if chunk.samples]
        done = self._append_tokens(seqs, self.model.logits(hidden[rows])) if seqs else []
        self.stats.time_s += time.perf_counter() - started
        return done

    def _read_salts(self) -> None:
        """Once a step: a trainer's write makes cached keys and values of that adapter stale."""
        self._salts.clear()  # in place: the scheduler reads it too
        self._salts |= {None: None} | {name: (name, adapter.version) for name, adapter in self.model.adapters.items()}

    def _count(self, step: Step) -> None:
        self.stats.num_steps += 1
        self.stats.num_preempted += len(step.preempted)
        for chunk in step.chunks:
            seq = chunk.seq
            self.stats.num_decode_tokens += chunk.samples
            self.stats.num_prefill_tokens += max(0, min(chunk.end, seq.num_prompt_tokens) - chunk.start)

    def _batch(self, chunks: list[Chunk]) -> PackedBatch:
        """The chunks' tokens as one packed batch on the host, with where each is written and read in the cache."""
        size = self.cfg.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for chunk in chunks:
            table = chunk.seq.block_table
            span = range(chunk.start, chunk.end)
            ids += chunk.seq.token_ids[chunk.start : chunk.end]
            positions += span
            slots += [table[p // size] * size + p % size for p in span]
        lens = [chunk.num_tokens for chunk in chunks]
        width = max(len(chunk.seq.block_table) for chunk in chunks)
        tables = [chunk.seq.block_table + [0] * (width - len(chunk.seq.block_table)) for chunk in chunks]
        contexts = [chunk.end for chunk in chunks]
        int32 = partial(torch.tensor, dtype=torch.int32)
        paged = PagedMeta(torch.tensor(slots), int32(tables), int32(contexts), max(contexts))
        adapters, at = [], 0
        for name, group in groupby(chunks, key=lambda c: c.seq.request.adapter):
            end = at + sum(chunk.num_tokens for chunk in group)
            if name is not None:
                adapters.append((name, at, end))
            at = end
        starts = int32([0, *accumulate(lens)])
        return PackedBatch(torch.tensor(ids), torch.tensor(positions), starts, tuple(lens), tuple(adapters), paged)

    def _append_tokens(self, seqs: list[Sequence], logits: Tensor) -> list[Completion]:
        """Draw each sequence's next token; finish those that end with it."""
        samples = [self._samples[seq.key] for seq in seqs]
        keys, ends, vocab = [s.key for s in samples], [s.ends for s in samples], self.model.vocab
        tokens, logprobs = sampling.draw(logits, seqs, keys, ends, vocab)
        done = []
        for i, (seq, sample, token, logprob) in enumerate(
            zip(seqs, samples, tokens.tolist(), logprobs.tolist(), strict=True)
        ):
            params = seq.request.params
            seq.token_ids.append(token)
            if sample.logprobs is not None:
                sample.logprobs.append(sampling.entry(logits[i], token, logprob, params, vocab))
            sample.push(token)
            if seq.num_output_tokens >= params.min_tokens and sample.stops(token):
                done.append(self._finish(seq, sample, "stop"))
            elif seq.num_output_tokens >= params.max_tokens:
                done.append(self._finish(seq, sample, "length"))
        return done

    def _finish(self, seq: Sequence, sample: _Sample, reason: str) -> Completion:
        self.scheduler.finish(seq, reason)
        del self._samples[seq.key]
        self.stats.num_cached_tokens += seq.num_cached_tokens
        ids = seq.output_token_ids
        if reason == "stop" and ids[-1] not in sample.ends:
            text = sample.text  # cut before the stop string
        else:
            text = self.tokenizer.decode(ids[:-1] if reason == "stop" else ids)
        read = sample.prompt_logprobs
        return Completion(
            seq.request.id, seq.sample, text, ids, reason, seq.num_prompt_tokens, seq.num_cached_tokens,
            logprobs=sample.logprobs,
            prompt_logprobs=None if read is None else [read[place] for place in sorted(read)],
            vectors=self._pools.take(seq.key) if seq.request.params.pool else None,
        )  # fmt: skip


def num_cache_blocks(model: Transformer, cfg: SamplerConfig) -> int:
    """Blocks that the memory set aside for the cache holds, and no more than max_num_seqs full contexts could use.

    Unset, it is nine tenths of the free memory on a GPU, the rest being for passes and their graphs, and on a CPU half
    of it, shared by the ranks that are there. Raises UserError where not one block fits.
    """
    block_bytes = KVCache.block_bytes(model.config, cfg.block_size, model.dtype)
    if cfg.kv_cache_gib is not None:
        limit = int(cfg.kv_cache_gib * 2**30)
    elif model.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of an earlier cache counts as used otherwise
        limit = int(0.9 * torch.cuda.mem_get_info(model.device)[0])
    else:
        limit = _free_memory() // 2 // ranks.local_world_size()
    if limit < block_bytes:
        raise UserError(
            f"A key/value cache of {limit / 2**30:.3f} GiB holds no block of {cfg.block_size} tokens, which takes "
            f"{block_bytes / 2**20:.1f} MiB: raise sampler.kv_cache_gib or lower sampler.block_size."
        )
    return min(limit // block_bytes, cfg.max_num_seqs * -(-model.config.context_len // cfg.block_size))


def _free_memory() -> int:
    """Bytes of main memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _special_id(tokenizer: Tokenizer, text: str) -> int | None:
    token = tokenizer.token_id(text)
    return token if token in tokenizer.special_ids else None
