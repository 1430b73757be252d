"""What the engine computes next: continuous batching with chunked prefill, preemption and n samples per prompt.

Each step takes up to `max_num_batched_tokens` tokens: first one token of every sequence that decodes, then more of the
prompts that are partly computed, then newly admitted sequences, each group in order of arrival. The rules:

Admission. A sequence is given all blocks of its present tokens at once, so prefill never runs out of blocks half-way.
    It is admitted only if thereafter one more block is left for each running sequence to grow into.
Shared prefixes. What others have computed before is found in the cache. If the next block that a waiting sequence lacks
    is just being computed by a running one, it waits until that is there, and those behind it with it: a prefix that
    many requests share is computed once, also where they all come at the same moment.
Preemption. If a decoding sequence finds no block to grow into, the latest arrival among the running ones gives up its
    blocks and waits again, ahead of all later arrivals; its tokens stay, its keys and values are computed again. The
    earliest one is never a victim while others run, so there is always progress; alone, each fits (`add` sees to it).
Samples. Of a request's n samples the first computes the prompt and the others wait for it; they then share its full
    blocks, copy the partly filled one, and compute the prompt's last token again to draw their own first token from it.
    If no sample that holds the prompt is left (all were preempted), the next in line computes it for the others.

A sequence whose salt (adapter and version) changes while it runs gives up its blocks too: keys and values never mix
versions.
"""

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from isheep.config import UserError
from isheep.sampler.block_manager import BlockManager
from isheep.sampler.request import Request, Sequence, Status


@dataclass(frozen=True)
class Chunk:
    """Compute tokens start … start+num_tokens-1 of `seq`; `samples`: draw its next token from the last of them."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass
class Step:
    """One forward pass: do the block `copies` (source, destination), then compute the `chunks`.

    No source is also a destination, so the copies can be done in any order or at once. `preempted` is for the record.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0


@dataclass
class _Group:
    """The samples of one request.

    held     waiting samples that are out of the queue until the prompt is computed by another, running or queued
    holders  sample -> sequence with the computed prompt in its blocks: running, or finished and departing
    """

    members: list[Sequence]
    num: Counter[Status]
    held: list[Sequence] = field(default_factory=list)
    holders: dict[int, Sequence] = field(default_factory=dict)


class Scheduler:
    """The engine's loop around it is

        while scheduler.has_work:
            step = scheduler.schedule()
            ...                                     # copies; forward; one sampled token per chunk with chunk.samples
            scheduler.update(step)                  # these tokens are now in the cache
            for chunk in step.chunks:
                if chunk.samples:
                    chunk.seq.token_ids.append(token)
                    if it ends here: scheduler.finish(chunk.seq, reason)

    The engine appends exactly one token for each such chunk, after `update`, and must finish a sequence with its
    max_tokens-th output token at the latest. `add` and `abort` are for any time but between `schedule` and `update`;
    when a step fails there, `abort` what is left and drop the step.
    `salt(adapter name or None)` is what keys and values depend on besides the tokens, with a unique repr: None for the
    base model, (name, version) for an adapter.
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, salt: Callable[[str | None], object]
    ):
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []  # in order of arrival
        self._salt = salt
        self._queue: list[tuple[int, Sequence]] = []  # heap of (arrival, waiting sequence); aborted ones are left in it
        self._departing: list[Sequence] = []  # finished, but waiting samples may share their prompt in the next step
        self._groups: dict[str, _Group] = {}
        self._num_waiting = 0
        self._arrivals = count()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        return self._num_waiting > 0 or len(self.running) > 0

    @property
    def waiting(self) -> list[Sequence]:
        """All waiting sequences in order of arrival. Made anew at each call: ask `num_waiting` in a loop."""
        members = [seq for group in self._groups.values() for seq in group.members]
        return sorted((seq for seq in members if seq.status is Status.WAITING), key=lambda seq: seq.arrival)

    # ---- requests come and go ----

    def check(self, request: Request) -> None:
        """UserError if one of the request's samples could outgrow the cache, or the id is in use."""
        num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if request.id in self._groups:
            raise UserError(f'Two requests have the id "{request.id}" at the same time; give each its own.')
        if num_prompt + max_tokens > self.blocks.capacity:
            raise UserError(
                f'Request "{request.id}" may take {num_prompt + max_tokens} tokens ({num_prompt} of prompt, max_tokens '
                f"{max_tokens}), but the cache holds {self.blocks.capacity}; raise kv_cache_gib or lower max_tokens."
            )

    def add(self, request: Request) -> list[Sequence]:
        """Queue the request's n samples; UserError as `check` says."""
        self.check(request)
        members = [Sequence(request, sample, next(self._arrivals)) for sample in range(request.params.n)]
        self._groups[request.id] = _Group(members, Counter({Status.WAITING: len(members)}))
        self._num_waiting += len(members)
        for seq in members:
            heapq.heappush(self._queue, (seq.arrival, seq))
        return members

    def finish(self, seq: Sequence, reason: str) -> None:
        """A running sequence has its last token."""
        group = self._groups[seq.request.id]
        assert seq.sample in group.holders, f"{seq.key} ends before its prompt is computed"
        is_wanted = group.num[Status.WAITING] > 0
        self._leave(seq, Status.FINISHED)
        seq.finish_reason = reason
        if is_wanted:
            group.holders[seq.sample] = seq
            self._departing.append(seq)
        else:
            self.blocks.free(seq)
        if group.num[Status.FINISHED] == len(group.members):
            del self._groups[seq.request.id]

    def abort(self, request_id: str) -> list[Sequence]:
        """Finish what is left of a request, with the reason "abort", and return it; [] for an id that is not active."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return []
        self._free_departing()
        aborted = [seq for seq in group.members if seq.status is not Status.FINISHED]
        for seq in aborted:
            if seq.status is Status.RUNNING:
                self.running.remove(seq)
                self.blocks.free(seq)
            else:
                self._num_waiting -= 1
            seq.status, seq.finish_reason = Status.FINISHED, "abort"
        return aborted

    # ---- a step ----

    def schedule(self) -> Step:
        """Choose the next step's chunks and give them their blocks. Not empty while there is work."""
        step = Step()
        self._requeue_stale(step)
        self._schedule_decodes(step)
        for seq in self.running:
            if seq.num_tokens - seq.num_computed_tokens > 1:
                self._add_chunk(step, seq)
        self._admit_waiting(step)
        self._free_departing()
        assert step.chunks or not self.has_work, "work, but nothing to compute"
        return step

    def update(self, step: Step) -> None:
        """Record that the step's chunks are in the cache. Called after the forward pass, before tokens are appended."""
        for chunk in step.chunks:
            seq = chunk.seq
            assert seq.status is Status.RUNNING and seq.num_computed_tokens == chunk.start, f"{seq.key} out of step"
            seq.num_computed_tokens = chunk.end
            self.blocks.commit(seq)
            if chunk.end >= seq.num_prompt_tokens:
                group = self._groups[seq.request.id]
                group.holders[seq.sample] = seq
                for other in group.held:
                    heapq.heappush(self._queue, (other.arrival, other))
                group.held.clear()

    def _requeue_stale(self, step: Step) -> None:
        for seq in [seq for seq in self.running if seq.salt != self._salt(seq.request.adapter)]:
            self._preempt(seq, step)

    def _schedule_decodes(self, step: Step) -> None:
        """One token of each running sequence that has one left to compute; late arrivals may have to go for it."""
        for seq in list(self.running):
            if step.num_tokens == self.max_num_batched_tokens:
                break
            if seq.status is Status.RUNNING and seq.num_tokens - seq.num_computed_tokens == 1 and self._grow(seq, step):
                self._add_chunk(step, seq)

    def _grow(self, seq: Sequence, step: Step) -> bool:
        """See that `seq` has a slot for its last token. False if it was itself preempted, being the latest arrival."""
        while not self.blocks.allocate(seq, seq.num_tokens):
            if self._departing:
                self._free_departing()
                continue
            assert len(self.running) > 1, f"{seq.key} outgrew the cache alone: finish it at max_tokens"
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is seq:
                return False
        return True

    def _admit_waiting(self, step: Step) -> None:
        while self._queue and len(self.running) < self.max_num_seqs and step.num_tokens < self.max_num_batched_tokens:
            seq = self._queue[0][1]
            group = None if seq.status is Status.FINISHED else self._groups[seq.request.id]
            if group is None:
                heapq.heappop(self._queue)
            elif group.num[Status.RUNNING] and not group.holders:
                group.held.append(heapq.heappop(self._queue)[1])
            elif self._admit(seq, group, step):
                heapq.heappop(self._queue)
                self._add_chunk(step, seq)
            elif self._departing and not self.running:
                self._free_departing()
            else:
                break

    def _admit(self, seq: Sequence, group: _Group, step: Step) -> bool:
        """Give `seq` the blocks of all its tokens, shared ones first, and let it run.

        False if too few are free, or if it waits for a shared one.
        """
        seq.set_salt(self._salt(seq.request.adapter))
        prefix = self.blocks.match(seq)
        parent = next((holder for holder in group.holders.values() if holder.salt == seq.salt), None)
        if parent is not None:
            prefix = max(self.blocks.fork(parent, seq), prefix, key=lambda found: found.num_tokens)
        if self.blocks.is_coming(seq, prefix, self.running):
            return False
        reserve = len(self.running) + 1 if self.running else 0
        if not self.blocks.allocate(seq, seq.num_tokens, prefix, reserve):
            return False
        if prefix.copy_from is not None:
            step.copies.append((prefix.copy_from, seq.block_table[len(prefix.blocks)]))
        seq.num_computed_tokens = prefix.num_tokens
        if not seq.was_admitted:
            seq.was_admitted, seq.num_cached_tokens = True, prefix.num_tokens
        self._set_status(seq, Status.RUNNING)
        insort(self.running, seq, key=lambda other: other.arrival)
        return True

    def _add_chunk(self, step: Step, seq: Sequence) -> None:
        start = seq.num_computed_tokens
        num_tokens = min(seq.num_tokens - start, self.max_num_batched_tokens - step.num_tokens)
        if num_tokens > 0:
            step.chunks.append(Chunk(seq, start, num_tokens, samples=start + num_tokens == seq.num_tokens))
            step.num_tokens += num_tokens

    # ---- a sequence stops running ----

    def _preempt(self, seq: Sequence, step: Step) -> None:
        """Back to the queue, with its tokens and without its blocks."""
        self._leave(seq, Status.WAITING)
        self.blocks.free(seq)
        seq.num_computed_tokens = 0
        heapq.heappush(self._queue, (seq.arrival, seq))
        step.preempted.append(seq)

    def _leave(self, seq: Sequence, status: Status) -> None:
        assert seq.status is Status.RUNNING, f"{seq.key} is {seq.status}, not running"
        self.running.remove(seq)
        self._set_status(seq, status)
        self._groups[seq.request.id].holders.pop(seq.sample, None)

    def _free_departing(self) -> None:
        for seq in self._departing:
            if group := self._groups.get(seq.request.id):
                group.holders.pop(seq.sample, None)
            self.blocks.free(seq)
        self._departing.clear()

    def _set_status(self, seq: Sequence, status: Status) -> None:
        num = self._groups[seq.request.id].num
        num[seq.status] -= 1
        num[status] += 1
        self._num_waiting += (status is Status.WAITING) - (seq.status is Status.WAITING)
        seq.status = status

    def check_integrity(self) -> None:
        """Assert that queue, groups, counts and cache agree. For tests, between `update` and `schedule`."""
        self.blocks.check_integrity([*self.running, *self._departing])
        members = [seq for group in self._groups.values() for seq in group.members]
        queued = [seq for _, seq in self._queue if seq.status is not Status.FINISHED]
        held = [seq for group in self._groups.values() for seq in group.held]
        by_arrival = sorted(members, key=lambda seq: seq.arrival)
        assert self.running == [seq for seq in by_arrival if seq.status is Status.RUNNING], "running"
        found = sorted([*queued, *held], key=lambda seq: seq.arrival)
        assert found == self.waiting, "a waiting sequence is lost or queued twice"
        assert self._num_waiting == len(self.waiting) and len(self.running) <= self.max_num_seqs, "counts"
        for seq in self.waiting:
            assert not seq.block_table and seq.num_computed_tokens == 0, f"{seq.key} waits with blocks"
        for group in self._groups.values():
            assert +group.num == Counter(seq.status for seq in group.members), "counts of a group"
            assert not group.held or not group.holders, "held, though the prompt is computed"
            assert not group.held or group.num[Status.RUNNING] + group.num[Status.WAITING] > len(group.held), (
                "held for nobody"
            )
            for holder in group.holders.values():
                assert holder in self.running or holder in self._departing, f"{holder.key} does not hold the prompt"
                assert holder.num_computed_tokens >= holder.num_prompt_tokens
