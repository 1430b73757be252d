"""Who owns which block of the paged key/value cache.

The cache is `num_blocks` blocks of `block_size` token slots. A block is an int; its tensors are the engine's affair.
At any moment a block is in exactly one state:

    held    in the block table of one or more sequences (reference count > 0)
    cached  in none, but its contents are registered under a key and can be found again. Evicted when space is needed:
            least recently freed first, and of one sequence's blocks the last first, as none is of use without its head
    free    in none, contents meaningless

A block's key is a chained 128-bit digest: of the key before it and its own tokens, the sequence's salt at the root.
Equal keys mean the same tokens at the same positions after the same history, by the same adapter in the same version.

Only full, computed blocks are ever shared, and these are never written again; so a sequence that goes on from another's
partly filled block gets a copy of that block (`fork`), and no block has to be copied later.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from isheep.sampler.request import Sequence


@dataclass(frozen=True)
class Prefix:
    """Tokens of a sequence that are in the cache already.

    The first `num_tokens` tokens lie in `blocks`, all of them full, and, if the last tokens are in a partly used block
    of another sequence, in `copy_from`, whose contents must be copied into the block that follows.
    """

    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    copy_from: int | None = None


NO_PREFIX = Prefix()


class BlockManager:
    """Hands out cache blocks. Every call costs at most the number of blocks of the sequence it is about."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        assert num_blocks > 0 and block_size > 0, f"a cache of {num_blocks} blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._num_refs = [0] * num_blocks
        self._key: list[bytes | None] = [None] * num_blocks  # block -> the key it is registered under
        self._block: dict[bytes, int] = {}  # key -> block, the inverse
        self._free = list(range(num_blocks))[::-1]  # taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # evicted from the front

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a sequence could be given now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def capacity(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    def usage(self) -> float:
        """Held blocks as a share of all."""
        return 1 - self.num_free_blocks / self.num_blocks

    def match(self, seq: Sequence) -> Prefix:
        """The longest registered prefix of `seq` in full blocks, of what may come from the cache. Takes nothing."""
        blocks: list[int] = []
        for i in range(seq.num_cacheable_tokens // self.block_size):
            block = self._block.get(self._key_of(seq, i))
            if block is None:
                break
            blocks.append(block)
        return Prefix(len(blocks) * self.block_size, blocks)

    def is_coming(self, seq: Sequence, prefix: Prefix, running: Iterable[Sequence]) -> bool:
        """Whether the block that `seq` lacks after `prefix`, its match, is one that a running sequence will compute."""
        i = len(prefix.blocks)
        end = (i + 1) * self.block_size
        if not self.prefix_caching or end > seq.num_cacheable_tokens:
            return False
        computing = (other for other in running if other.num_computed_tokens < end <= other.num_tokens)
        return any(self._key_of(other, i) == self._key_of(seq, i) for other in computing)

    def fork(self, parent: Sequence, child: Sequence) -> Prefix:
        """What `child` can share of `parent`, a sample of the same prompt that has computed it. Takes nothing.

        That is the prompt; without its last token if the child has no output yet, because it draws its first token from
        that one. Works without prefix caching, and down to the token, not to the full block.
        """
        assert parent.request is child.request and parent.salt == child.salt
        num_tokens = min(child.num_prompt_tokens, child.num_tokens - 1)
        assert parent.num_computed_tokens >= num_tokens
        num_full, rest = divmod(num_tokens, self.block_size)
        return Prefix(num_tokens, parent.block_table[:num_full], parent.block_table[num_full] if rest else None)

    def allocate(self, seq: Sequence, num_tokens: int, prefix: Prefix = NO_PREFIX, reserve: int = 0) -> bool:
        """Make `seq.block_table` cover `num_tokens` slots, beginning with the prefix's blocks if it holds none yet.

        False, and nothing changed, unless `reserve` blocks would remain free afterwards.
        """
        assert not (prefix.blocks and seq.block_table), f"{seq.key} holds blocks already"
        num_new = -(-num_tokens // self.block_size) - len(seq.block_table) - len(prefix.blocks)
        if num_new <= 0 and not prefix.blocks:
            return True
        num_revived = sum(self._num_refs[block] == 0 for block in prefix.blocks)
        if num_new + num_revived + reserve > self.num_free_blocks:
            return False
        for block in prefix.blocks:
            self._cached.pop(block, None)
            self._num_refs[block] += 1
        seq.block_table += prefix.blocks
        seq.block_table += [self._take() for _ in range(num_new)]
        return True

    def commit(self, seq: Sequence) -> None:
        """Register the blocks that the computed tokens of `seq` filled since the last call, if prefixes are cached.

        Where another block with the same contents is registered, that one stays; the sequence's own stays unregistered.
        """
        num_full = seq.num_computed_tokens // self.block_size
        if self.prefix_caching:
            for i in range(seq.num_committed_blocks, num_full):
                key, block = self._key_of(seq, i), seq.block_table[i]
                if key not in self._block:
                    self._block[key] = block
                    self._key[block] = key
        seq.num_committed_blocks = max(seq.num_committed_blocks, num_full)

    def free(self, seq: Sequence) -> None:
        """Take the blocks from `seq`; those that no other sequence holds become cached or free."""
        for block in reversed(seq.block_table):
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        seq.block_table.clear()
        seq.num_committed_blocks = 0

    def reset(self) -> None:
        """Forget all cached contents. For times when no sequence holds a block."""
        assert len(self._free) + len(self._cached) == self.num_blocks, "reset while sequences hold blocks"
        self._block.clear()
        self._key = [None] * self.num_blocks
        self._cached.clear()
        self._free = list(range(self.num_blocks))[::-1]

    def _take(self) -> int:
        """A block with no contents and one reference; the least recently freed cached one if none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key, self._key[block] = self._key[block], None
            assert key is not None, f"cached block {block} has no key"
            del self._block[key]
        self._num_refs[block] = 1
        return block

    def _key_of(self, seq: Sequence, index: int) -> bytes:
        """The key of the sequence's full block number `index`. Tokens are only ever appended, so keys are kept."""
        keys, size = seq.block_keys, self.block_size
        while len(keys) <= index:
            before = keys[-1] if keys else blake2b(repr(seq.salt).encode(), digest_size=16).digest()
            tokens = array("q", seq.token_ids[len(keys) * size : (len(keys) + 1) * size])
            assert len(tokens) == size, f"block {len(keys)} of {seq.key} is not full"
            keys.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return keys[index]

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert all that the module's head says, given every sequence that holds blocks."""
        sequences = list(sequences)
        num_refs = Counter(block for seq in sequences for block in seq.block_table)
        assert self._num_refs == [num_refs[block] for block in range(self.num_blocks)], "reference counts"
        states = sorted([*self._free, *self._cached, *num_refs])
        assert states == list(range(self.num_blocks)), "a block is in no state or in two"
        assert all(self._key[block] is None for block in self._free), "a free block has a key"
        assert all(self._key[block] is not None for block in self._cached), "a cached block has no key"
        registered = {key: block for block, key in enumerate(self._key) if key is not None}
        assert registered == self._block, "keys and blocks are not inverse"
        for seq in sequences:
            self._check_sequence(seq)

    def _check_sequence(self, seq: Sequence) -> None:
        table, num_full = seq.block_table, seq.num_computed_tokens // self.block_size
        assert len(set(table)) == len(table), f"{seq.key} holds a block twice"
        num_slots = len(table) * self.block_size
        assert seq.num_computed_tokens <= min(seq.num_tokens, num_slots), f"{seq.key} outgrew its blocks"
        for i, block in enumerate(table):
            if i >= num_full:
                assert self._num_refs[block] == 1, f"{seq.key} shares block {block}, which is not full"
                assert self._key[block] is None, f"{seq.key} registered block {block}, which is not full"
            elif self._key[block] is not None:
                assert self._key[block] == self._key_of(seq, i), f"block {block} of {seq.key} is under another's key"
