"""The scheduler with a pretended model: a cache of integers in place of keys and values, and a rule in place of logits.

Each slot of the pretended cache holds (token, position, salt) as they were when it was computed. Before a chunk is
computed, all it would attend to is read through the block table and must be the sequence's own tokens under its own
salt: a stale or wrong prefix hit, a missing copy, or a block given to two sequences cannot pass unseen.
"""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from isheep.config import UserError
from isheep.sampler.block_manager import BlockManager
from isheep.sampler.request import Request, SamplingParams, Sequence, Status
from isheep.sampler.scheduler import Chunk, Scheduler, Step

STOP = 3


def next_token(token_ids: list[int], sample: int) -> int:
    """The pretended model: one of four tokens, by all tokens before and the sample's number."""
    state = sample
    for token in token_ids:
        state = (state * 31 + token + 1) % 1009
    return state % 4


def expected_output(request: Request, sample: int) -> list[int]:
    """What a sequence's output must be, whatever runs beside it."""
    token_ids = list(request.prompt_token_ids)
    for _ in range(request.params.max_tokens):
        token_ids.append(next_token(token_ids, sample))
        if token_ids[-1] == STOP and not request.params.ignore_eos:
            break
    return token_ids[len(request.prompt_token_ids) :]


class PretendEngine:
    """The engine's loop over the pretended cache. `history` records all that the scheduler decided."""

    def __init__(
        self, num_blocks: int, block_size: int = 4, max_num_seqs: int = 8, budget: int = 64, prefix_caching: bool = True
    ):
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget, self.salt)
        self.versions = {"a": 0, "b": 0}
        self.cache: list = [None] * (num_blocks * block_size)
        self.sequences: list[Sequence] = []
        self.history: list[tuple] = []
        self.num_computed = 0
        self.num_preempted = 0

    def salt(self, adapter: str | None) -> object:
        return None if adapter is None else (adapter, self.versions[adapter])

    def add(self, request: Request) -> list[Sequence]:
        members = self.scheduler.add(request)
        self.sequences += members
        return members

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.blocks.block_size
        return seq.block_table[position // size] * size + position % size

    def step(self) -> Step:
        step = self.scheduler.schedule()
        self.check_limits(step)
        self.history.append(
            (
                [(chunk.seq.key, chunk.start, chunk.num_tokens, tuple(chunk.seq.block_table)) for chunk in step.chunks],
                step.copies,
                [seq.key for seq in step.preempted],
            )
        )
        self.num_preempted += len(step.preempted)
        self.copy(step.copies)
        self.compute(step.chunks)
        self.scheduler.update(step)
        for chunk in step.chunks:
            if chunk.samples:
                self.sample(chunk.seq)
        self.scheduler.check_integrity()
        return step

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"work left after {max_steps} steps"
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        for seq in self.sequences:
            assert seq.status is Status.FINISHED
            expected = expected_output(seq.request, seq.sample)
            if seq.finish_reason == "abort":
                expected = expected[: seq.num_output_tokens]
            assert seq.output_token_ids == expected

    def check_limits(self, step: Step) -> None:
        running = self.scheduler.running
        assert 0 < sum(chunk.num_tokens for chunk in step.chunks) <= self.scheduler.max_num_batched_tokens
        assert len(running) <= self.scheduler.max_num_seqs
        assert len({chunk.seq for chunk in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            assert chunk.seq in running and chunk.num_tokens > 0 and chunk.start == chunk.seq.num_computed_tokens
            assert chunk.samples == (chunk.end == chunk.seq.num_tokens)
        assert not {source for source, _ in step.copies} & {destination for _, destination in step.copies}

    def copy(self, copies: list[tuple[int, int]]) -> None:
        size = self.blocks.block_size
        for source, destination in copies:
            self.cache[destination * size : (destination + 1) * size] = self.cache[source * size : (source + 1) * size]

    def compute(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self.check_read(chunk, chunk.start)
        written: set[int] = set()
        for chunk in chunks:
            slots = [self.slot(chunk.seq, position) for position in range(chunk.start, chunk.end)]
            assert not written & set(slots), "two sequences write to one slot"
            written.update(slots)
            for position, slot in enumerate(slots, chunk.start):
                self.cache[slot] = (chunk.seq.token_ids[position], position, chunk.seq.salt)
        for chunk in chunks:
            self.check_read(chunk, chunk.end)
            self.num_computed += chunk.num_tokens

    def check_read(self, chunk: Chunk, length: int) -> None:
        seq = chunk.seq
        assert seq.salt == self.salt(seq.request.adapter), "computing under a stale salt"
        read = [self.cache[self.slot(seq, position)] for position in range(length)]
        assert read == [(seq.token_ids[position], position, seq.salt) for position in range(length)]

    def sample(self, seq: Sequence) -> None:
        token = next_token(seq.token_ids, seq.sample)
        seq.token_ids.append(token)
        if token == STOP and not seq.request.params.ignore_eos:
            self.scheduler.finish(seq, "stop")
        elif seq.num_output_tokens == seq.request.params.max_tokens:
            self.scheduler.finish(seq, "length")


def request(
    id: str,
    prompt: int | list[int],
    max_tokens: int = 4,
    n: int = 1,
    adapter: str | None = None,
    ignore_eos: bool = True,
) -> Request:
    """A request whose prompt is `prompt`, or that many tokens which no other request of a test shares."""
    if isinstance(prompt, int):
        prompt = [1000 * (sum(id.encode()) + 1) + i for i in range(prompt)]
    return Request(id, tuple(prompt), SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=ignore_eos), adapter)


def chunks_of(step: Step) -> list[tuple]:
    return [(*chunk.seq.key, chunk.start, chunk.num_tokens) for chunk in step.chunks]


# ---- crafted cases ----


def test_decodes_come_first_then_begun_prompts_then_new_ones() -> None:
    engine = PretendEngine(64, budget=10)
    engine.add(request("a", 4))
    engine.add(request("b", 12))
    assert chunks_of(engine.step()) == [("a", 0, 0, 4), ("b", 0, 0, 6)]
    engine.add(request("c", 7))
    step = engine.step()
    assert chunks_of(step) == [("a", 0, 4, 1), ("b", 0, 6, 6), ("c", 0, 0, 3)]
    assert [chunk.samples for chunk in step.chunks] == [True, True, False]
    assert chunks_of(engine.step()) == [("a", 0, 5, 1), ("b", 0, 12, 1), ("c", 0, 3, 4)]
    engine.run()


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    engine = PretendEngine(64, budget=10)
    engine.add(request("a", 25, max_tokens=2))
    assert [chunks_of(engine.step())[0][2:] for _ in range(4)] == [(0, 10), (10, 10), (20, 5), (25, 1)]
    assert not engine.scheduler.has_work


def test_sequences_beyond_the_budget_take_no_blocks() -> None:
    engine = PretendEngine(64)
    first, second = (engine.add(request(id, 4))[0] for id in "ab")
    engine.step()
    engine.scheduler.max_num_batched_tokens = 1
    assert chunks_of(engine.step()) == [("a", 0, 4, 1)]
    assert (len(first.block_table), len(second.block_table)) == (2, 1)
    engine.run()


def test_no_more_than_max_num_seqs_run() -> None:
    engine = PretendEngine(64, max_num_seqs=3)
    for i in range(5):
        engine.add(request(str(i), 3, max_tokens=2 + i))
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (3, 2)
    assert [seq.request.id for seq in engine.scheduler.waiting] == ["3", "4"]
    engine.run()


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    engine = PretendEngine(6)
    engine.add(request("a", 8, max_tokens=1))
    engine.add(request("b", 8, max_tokens=1))
    engine.add(request("c", 1, max_tokens=1))
    # a: 2 blocks; b: 2 more, which leaves 2 for the two of them; c, 1 more, would leave 1 for three.
    assert chunks_of(engine.step()) == [("a", 0, 0, 8), ("b", 0, 0, 8)]
    engine.run()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_latest_arrival_is_preempted_and_goes_to_the_front(prefix_caching: bool) -> None:
    engine = PretendEngine(7, prefix_caching=prefix_caching)
    first, second = (engine.add(request(id, 8, max_tokens=12))[0] for id in "ab")
    engine.step()
    engine.add(request("c", 8))
    while not (step := engine.step()).preempted:
        pass
    assert step.preempted == [second]
    assert second.num_computed_tokens == 0 and second.num_output_tokens > 0 and second.block_table == []
    assert engine.scheduler.running == [first]
    assert [seq.request.id for seq in engine.scheduler.waiting] == ["b", "c"]
    while second.status is Status.WAITING:
        engine.step()
    starts = {key: start for key, start, *_ in engine.history[-1][0]}
    assert starts[second.key] == (8 if prefix_caching else 0)
    assert second.num_cached_tokens == 0, "what it finds of itself when it comes back does not count"
    engine.run()


def test_a_request_that_fills_the_whole_cache_runs_and_one_token_more_is_refused() -> None:
    engine = PretendEngine(4, budget=5)
    engine.add(request("a", 15, max_tokens=1))
    engine.add(request("b", 1, max_tokens=15))
    with pytest.raises(
        UserError, match=r'"c" may take 17 tokens \(5 of prompt, max_tokens 12\), but .* holds 16; raise kv'
    ):
        engine.add(request("c", 5, max_tokens=12))
    engine.run()


def test_an_id_can_be_used_again_but_not_twice_at_once() -> None:
    engine = PretendEngine(16)
    engine.add(request("a", 3))
    with pytest.raises(UserError, match='the id "a"'):
        engine.add(request("a", 5))
    engine.run()
    engine.add(request("a", 5))
    engine.run()


def test_a_shared_prefix_is_computed_once() -> None:
    engine = PretendEngine(64)
    shared = list(range(50, 62))
    engine.add(request("first", [*shared, 1]))
    engine.step()
    members = [engine.add(request(f"r{i}", [*shared, 2, i]))[0] for i in range(3)]
    step = engine.step()
    assert chunks_of(step) == [("first", 0, 13, 1)] + [(f"r{i}", 0, 12, 2) for i in range(3)]
    assert [seq.num_cached_tokens for seq in members] == [12, 12, 12]
    engine.run()


@pytest.mark.parametrize("budget", [64, 5])
def test_a_prefix_of_requests_that_come_at_once_is_computed_once(budget: int) -> None:
    engine = PretendEngine(64, budget=budget)
    shared = list(range(50, 62))
    members = [engine.add(request(f"r{i}", [*shared, i, i], max_tokens=1))[0] for i in range(5)]
    (other,) = engine.add(request("other", 6, max_tokens=1))
    if budget == 64:
        assert chunks_of(engine.step()) == [("r0", 0, 0, 14)], "those that share it wait, and who came after them"
        assert chunks_of(engine.step())[:2] == [("r1", 0, 12, 2), ("r2", 0, 12, 2)]
    engine.run()
    assert [seq.num_cached_tokens for seq in [*members, other]] == [0, 12, 12, 12, 12, 0]
    assert engine.num_computed == 14 + 4 * 2 + 6


def test_one_that_waits_for_a_prefix_computes_it_when_the_other_is_gone() -> None:
    engine = PretendEngine(64, budget=5)
    for id in "ab":
        engine.add(request(id, list(range(50, 62)), max_tokens=1))
    assert chunks_of(engine.step()) == [("a", 0, 0, 5)]
    assert engine.scheduler.abort("a")
    assert chunks_of(engine.step()) == [("b", 0, 4, 5)], "the one block that was there is found"
    engine.run()


def test_outputs_are_found_too_and_without_prefix_caching_nothing_is() -> None:
    for prefix_caching, num_cached in [(True, 12), (False, 0)]:
        engine = PretendEngine(64, prefix_caching=prefix_caching)
        (first,) = engine.add(request("first", 6, max_tokens=8))
        engine.run()
        (second,) = engine.add(request("second", [*first.token_ids, 0]))
        engine.run()
        assert second.num_cached_tokens == num_cached


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_prompt", [1, 7, 8, 9])
def test_samples_share_the_prompt(num_prompt: int, prefix_caching: bool) -> None:
    engine = PretendEngine(64, prefix_caching=prefix_caching)
    members = engine.add(request("a", num_prompt, max_tokens=3, n=5))
    assert chunks_of(engine.step()) == [("a", 0, 0, num_prompt)], "the others wait for the first"
    assert engine.scheduler.num_waiting == 4
    step = engine.step()
    last = num_prompt - 1
    assert chunks_of(step) == [("a", 0, num_prompt, 1)] + [("a", sample, last, 1) for sample in range(1, 5)]
    assert [seq.num_cached_tokens for seq in members] == [0, last, last, last, last]
    num_shared = last // 4
    assert all(seq.block_table[:num_shared] == members[0].block_table[:num_shared] for seq in members)
    assert step.copies == [
        (members[0].block_table[num_shared], seq.block_table[num_shared]) for seq in members[1:] if last % 4
    ]
    num_held = num_shared + 4 + len(members[0].block_table) - num_shared
    assert engine.blocks.num_free_blocks == 64 - num_held
    engine.run()
    assert engine.num_computed == num_prompt + 2 + 4 * 3


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_samples_of_one_token_share_the_prompt_of_the_finished_ones(prefix_caching: bool) -> None:
    engine = PretendEngine(64, max_num_seqs=3, prefix_caching=prefix_caching)
    engine.add(request("a", 10, max_tokens=1, n=8))
    engine.run()
    assert engine.num_computed == 10 + 7


def test_samples_that_wait_do_not_hold_up_other_requests() -> None:
    engine = PretendEngine(64, budget=10)
    engine.add(request("a", 8, n=2))
    engine.add(request("b", 8))
    assert chunks_of(engine.step()) == [("a", 0, 0, 8), ("b", 0, 0, 2)]
    engine.run()


def test_abort_of_the_sample_that_others_wait_for() -> None:
    engine = PretendEngine(64, budget=4)
    members = engine.add(request("a", 8, n=3))
    engine.add(request("b", 8))
    engine.step()
    assert engine.scheduler.abort("a") == members
    assert {seq.finish_reason for seq in members} == {"abort"}
    assert engine.scheduler.abort("a") == [] == engine.scheduler.abort("never seen")
    engine.scheduler.check_integrity()
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 1)
    engine.run()


def test_abort_takes_the_blocks_that_a_finished_sample_kept_for_others() -> None:
    engine = PretendEngine(16, max_num_seqs=1)
    engine.add(request("a", 8, max_tokens=1, n=3))
    engine.step()
    assert engine.blocks.num_free_blocks == 14
    assert len(engine.scheduler.abort("a")) == 2
    assert engine.blocks.num_free_blocks == 16


def test_a_new_version_of_an_adapter_finds_nothing_and_restarts_what_runs() -> None:
    engine = PretendEngine(64)
    prompt = list(range(9))
    (old,) = engine.add(request("old", prompt, max_tokens=20, adapter="a"))
    engine.add(request("base", prompt, max_tokens=20))
    engine.step()
    engine.versions["a"] += 1
    (new,) = engine.add(request("new", prompt, adapter="a"))
    step = engine.step()
    assert step.preempted == [old]
    assert chunks_of(step) == [("base", 0, 9, 1), ("old", 0, 0, 10)]
    assert chunks_of(engine.step())[2:] == [("new", 0, 8, 1)]
    assert new.num_cached_tokens == 8, "what the new version has computed"
    engine.run()


def test_a_long_waiting_list_costs_a_step_nothing() -> None:
    """Counts bytecodes, in place of a clock."""

    def num_bytecodes(num_requests: int) -> int:
        engine = PretendEngine(64, max_num_seqs=4)
        for i in range(num_requests):
            engine.add(request(str(i), 5, max_tokens=1))
        counted = 0

        def trace(frame, event: str, _):
            nonlocal counted
            frame.f_trace_opcodes = True
            counted += event == "opcode"
            return trace

        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(2):
                step = engine.scheduler.schedule()
                engine.scheduler.update(step)
                for chunk in step.chunks:
                    engine.scheduler.finish(chunk.seq, "length")
        finally:
            sys.settrace(outer)
        return counted

    assert num_bytecodes(1000) <= num_bytecodes(20)


def test_blocks_and_schedule_import_no_tensor_library() -> None:
    code = "import sys, isheep.sampler.scheduler; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- random histories ----

PROMPTS = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=14),
    st.builds(lambda length, last: [1] * length + [last], st.integers(0, 13), st.integers(0, 2)),
)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "max_tokens": st.integers(1, 9),
        "n": st.sampled_from([1, 1, 1, 2, 3, 6]),
        "adapter": st.sampled_from([None, None, "a", "b"]),
        "ignore_eos": st.booleans(),
    }
)
ENGINES = st.fixed_dictionaries(
    {
        # From too few for many a request, to just enough for one, to enough for a few.
        "num_blocks": st.integers(5, 30),
        "block_size": st.sampled_from([2, 3, 4]),
        "max_num_seqs": st.integers(1, 6),
        "budget": st.sampled_from([1, 2, 5, 9, 64]),
        "prefix_caching": st.booleans(),
    }
)


class SchedulerHistory(RuleBasedStateMachine):
    """Requests arrive, end, are aborted and preempted, adapters change; `PretendEngine` checks each step."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: PretendEngine | None = None
        self.ids: list[str] = []

    def start(self, options: dict) -> None:
        self.engine = self.engine or PretendEngine(**options)

    @rule(options=ENGINES, requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, options: dict, requests: list[dict]) -> None:
        self.start(options)
        for fields in requests:
            made = request(str(len(self.ids)), **fields)
            num_tokens = len(made.prompt_token_ids) + made.params.max_tokens
            if num_tokens > self.engine.blocks.capacity:
                with pytest.raises(UserError):
                    self.engine.add(made)
            else:
                self.engine.add(made)
            self.ids.append(made.id)

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.engine and self.engine.scheduler.has_work:
                self.engine.step()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.ids:
            self.engine.scheduler.abort(data.draw(st.sampled_from(self.ids[-6:]), "id"))

    @rule(adapter=st.sampled_from(["a", "b"]))
    def change_adapter(self, adapter: str) -> None:
        if self.engine:
            self.engine.versions[adapter] += 1

    @invariant()
    def is_sound(self) -> None:
        if self.engine:
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if self.engine:
            self.engine.run()


TestSchedulerHistory = SchedulerHistory.TestCase
TestSchedulerHistory.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ENGINES, st.lists(REQUESTS, min_size=1, max_size=12))
def test_the_same_arrivals_give_the_same_schedule(options: dict, requests: list[dict]) -> None:
    histories = []
    for _ in range(2):
        engine = PretendEngine(**options | {"num_blocks": 12})
        for i, fields in enumerate(requests):
            engine.add(request(str(i), **fields))
            engine.step()
        engine.run()
        histories.append(engine.history)
    assert histories[0] == histories[1]


def test_a_crowd_in_a_tiny_cache_is_preempted_and_ends_well() -> None:
    engine = PretendEngine(12, block_size=4, max_num_seqs=12, budget=16)
    for i in range(30):
        engine.add(request(str(i), [1] * (i % 9) + [i], max_tokens=20, n=1 + i % 3))
    engine.run()
    assert engine.num_preempted > 20
