"""Blocks of the cache: crafted cases of reuse, eviction and sharing, and random histories checked after every call."""

from collections.abc import Sequence as Items

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isheep.sampler.block_manager import BlockManager, Prefix
from isheep.sampler.request import Request, SamplingParams, Sequence


def sequence(tokens: Items[int], salt: object = None, request: Request | None = None) -> Sequence:
    seq = Sequence(request or Request("r", tuple(tokens)), sample=0, arrival=0)
    seq.set_salt(salt)
    return seq


def compute(blocks: BlockManager, seq: Sequence, prefix: Prefix | None = None) -> Prefix:
    """Admit `seq` with what is cached of it (or `prefix`), and compute the rest."""
    prefix = prefix or blocks.match(seq)
    assert blocks.allocate(seq, seq.num_tokens, prefix)
    seq.num_computed_tokens = seq.num_tokens
    blocks.commit(seq)
    return prefix


def release(blocks: BlockManager, seq: Sequence) -> None:
    blocks.free(seq)
    seq.num_computed_tokens = 0


def cached_once(
    tokens: Items[int], salt: object = None, num_blocks: int = 8, prefix_caching: bool = True
) -> BlockManager:
    """A manager with blocks of 4 that has computed and freed `tokens`."""
    blocks = BlockManager(num_blocks, 4, prefix_caching)
    seq = sequence(tokens, salt)
    compute(blocks, seq)
    release(blocks, seq)
    return blocks


def test_match_finds_full_blocks_and_leaves_one_token() -> None:
    blocks = cached_once(range(10))
    for length, found in [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8), (20, 8)]:
        assert blocks.match(sequence(range(length))).num_tokens == found, length
    assert blocks.match(sequence([0, 1, 2, 3, 99, 5, 6, 7, 8])).num_tokens == 4
    assert blocks.match(sequence([99, 1, 2, 3, 4, 5, 6, 7, 8])).num_tokens == 0


def test_a_block_is_found_only_after_the_same_history() -> None:
    blocks = cached_once([1, 2, 3, 4, 7, 7, 7, 7, 0])
    assert blocks.match(sequence([7, 7, 7, 7, 0])).num_tokens == 0
    assert blocks.match(sequence([9, 9, 9, 9, 7, 7, 7, 7, 0])).num_tokens == 0


def test_salt_separates_adapters_and_versions() -> None:
    blocks = cached_once(range(10), salt=("tuned", 1))
    assert blocks.match(sequence(range(10), ("tuned", 1))).num_tokens == 8
    for other in [None, ("tuned", 2), ("other", 1), ("tuned", None)]:
        assert blocks.match(sequence(range(10), other)).num_tokens == 0


def test_a_new_salt_renames_a_sequence() -> None:
    blocks = cached_once(range(10))
    seq = sequence(range(10))
    assert blocks.match(seq).num_tokens == 8
    seq.set_salt(("tuned", 1))
    assert blocks.match(seq).num_tokens == 0


def test_without_prefix_caching_nothing_is_kept() -> None:
    blocks = cached_once(range(10), prefix_caching=False)
    assert blocks.match(sequence(range(10))) == Prefix()
    assert blocks.num_free_blocks == 8
    blocks.check_integrity([])


def test_eviction_takes_the_oldest_sequence_first_and_its_tail_first() -> None:
    old, young = sequence(range(9)), sequence(range(100, 109))
    blocks = BlockManager(6, 4)
    for seq in (old, young):
        compute(blocks, seq)
    for seq in (old, young):
        release(blocks, seq)
    assert blocks.num_free_blocks == 6
    filler = sequence([7] * 100)
    found = []
    for num_blocks in range(1, 7):
        assert blocks.allocate(filler, 4 * num_blocks)
        found.append((blocks.match(old).num_tokens, blocks.match(young).num_tokens))
    # Two blocks were never full and go first.
    assert found == [(8, 8), (8, 8), (4, 8), (0, 8), (0, 4), (0, 0)]


def test_reuse_makes_a_prefix_young_again() -> None:
    old, young = sequence(range(9)), sequence(range(100, 109))
    blocks = BlockManager(6, 4)
    for seq in (old, young, old):
        compute(blocks, seq)
        release(blocks, seq)
    assert blocks.allocate(sequence([7] * 100), 4 * 4)
    assert (blocks.match(old).num_tokens, blocks.match(young).num_tokens) == (8, 0)


def test_allocate_refuses_whole_and_counts_the_cached_blocks_it_revives() -> None:
    blocks = cached_once(range(10), num_blocks=4)
    seq = sequence(range(16))
    prefix = blocks.match(seq)
    # 2 revived + 2 new of 4: fits exactly, but leaves nothing in reserve.
    assert not blocks.allocate(seq, 16, prefix, reserve=1)
    assert seq.block_table == [] and blocks.num_free_blocks == 4
    assert blocks.allocate(seq, 16, prefix)
    assert seq.block_table[:2] == prefix.blocks and blocks.num_free_blocks == 0
    assert not blocks.allocate(seq, 17)
    assert len(seq.block_table) == 4
    assert blocks.allocate(seq, 16), "no new block is needed"


def test_shared_blocks_are_counted_once() -> None:
    blocks = BlockManager(8, 4)
    first, second = sequence(range(10)), sequence(range(11))
    compute(blocks, first)
    assert compute(blocks, second).blocks == first.block_table[:2]
    assert blocks.num_free_blocks == 8 - 4
    assert blocks.usage() == 0.5
    release(blocks, first)
    assert blocks.usage() == 3 / 8
    blocks.check_integrity([second])


def test_the_first_registration_of_equal_contents_stays() -> None:
    blocks = BlockManager(8, 4)
    first, second = sequence(range(5)), sequence(range(5))
    for seq in (first, second):
        assert blocks.allocate(seq, 5)
        seq.num_computed_tokens = 5
    blocks.commit(second)
    blocks.commit(first)
    assert blocks.match(sequence(range(5))).blocks == second.block_table[:1] != first.block_table[:1]
    blocks.check_integrity([first, second])


def test_a_sequence_that_comes_back_is_registered_again() -> None:
    blocks = cached_once(range(10))
    seq = sequence(range(10))
    compute(blocks, seq)
    release(blocks, seq)
    filler = sequence([7] * 32)
    assert blocks.allocate(filler, 32)
    release(blocks, filler)
    assert compute(blocks, seq).num_tokens == 0, "all of it was evicted"
    assert blocks.match(sequence(range(10))).num_tokens == 8


def test_fork_shares_full_blocks_and_copies_the_partly_used_one() -> None:
    for num_prompt, num_full, is_copied in [(1, 0, False), (4, 0, True), (5, 1, False), (6, 1, True), (9, 2, False)]:
        blocks = BlockManager(8, 4, prefix_caching=False)
        request = Request("r", tuple(range(num_prompt)))
        parent, child = sequence((), request=request), sequence((), request=request)
        compute(blocks, parent)
        prefix = blocks.fork(parent, child)
        assert prefix.num_tokens == num_prompt - 1, "the first token of the output is drawn from the last of the prompt"
        assert prefix.blocks == parent.block_table[:num_full]
        assert prefix.copy_from == (parent.block_table[num_full] if is_copied else None)


def test_fork_of_a_sample_with_output_shares_the_whole_prompt() -> None:
    blocks = BlockManager(8, 4)
    request = Request("r", tuple(range(8)), SamplingParams(n=2))
    parent, child = sequence((), request=request), sequence((), request=request)
    compute(blocks, parent)
    child.token_ids += [50, 51]
    assert blocks.fork(parent, child) == Prefix(8, parent.block_table)


def test_reset_forgets_cached_contents() -> None:
    blocks = cached_once(range(10))
    blocks.reset()
    blocks.check_integrity([])
    assert blocks.match(sequence(range(10))).num_tokens == 0
    assert blocks.num_free_blocks == 8


class BlockHistory(RuleBasedStateMachine):
    """Sequences of few distinct tokens come, grow and go. `contents` is what was last written to each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(num_blocks=7, block_size=2)
        self.contents: dict[int, tuple] = {}
        self.alive: list[Sequence] = []

    def write(self, seq: Sequence, start: int) -> None:
        for position in range(start, seq.num_tokens):
            block = seq.block_table[position // 2]
            before = self.contents.get(block, ()) if position % 2 else ()
            self.contents[block] = (*before, (seq.token_ids[position], position, seq.salt))
        seq.num_computed_tokens = seq.num_tokens

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), salt=st.sampled_from([None, ("a", 1)]))
    def admit(self, tokens: list[int], salt: object) -> None:
        seq = sequence(tokens, salt)
        prefix = self.blocks.match(seq)
        assert prefix.num_tokens < seq.num_tokens
        num_free = self.blocks.num_free_blocks
        if self.blocks.allocate(seq, seq.num_tokens, prefix):
            self.write(seq, prefix.num_tokens)
            self.blocks.commit(seq)
            self.alive.append(seq)
        else:
            assert self.blocks.num_free_blocks == num_free < -(-seq.num_tokens // 2) and not seq.block_table

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), token=st.integers(0, 1), is_committed=st.booleans())
    def grow(self, data: st.DataObject, token: int, is_committed: bool) -> None:
        seq = data.draw(st.sampled_from(self.alive), "seq")
        if self.blocks.allocate(seq, seq.num_tokens + 1):
            seq.token_ids.append(token)
            self.write(seq, seq.num_tokens - 1)
            if is_committed:
                self.blocks.commit(seq)
        else:
            assert self.blocks.num_free_blocks == 0

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.alive), "seq")
        self.alive.remove(seq)
        release(self.blocks, seq)

    @precondition(lambda self: not self.alive)
    @rule()
    def reset(self) -> None:
        self.blocks.reset()

    @invariant()
    def is_sound(self) -> None:
        self.blocks.check_integrity(self.alive)
        for seq in self.alive:
            written = [entry for block in seq.block_table for entry in self.contents[block]]
            assert written == [(token, position, seq.salt) for position, token in enumerate(seq.token_ids)]


TestBlockHistory = BlockHistory.TestCase
TestBlockHistory.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
