"""What a caller asks of the sampler, what it gets back, and the state of one sequence in between.

A `Request` asks for `params.n` samples of one prompt. Each of them is a `Sequence` while it is being computed and a
`Completion` when it is done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from isheep.config import UserError

if TYPE_CHECKING:
    from torch import Tensor


def _integer(low: int, high: float = math.inf) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[object], bool]:
    def allowed(value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return low <= value <= high and not (open_low and value == low)

    return allowed


def _optional(rule: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or rule(value)


def _each(rule: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and all(rule(item) for item in value)


_TOKEN_ID = _integer(0)

# field -> (is this value allowed?, the allowed values in words)
_RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "n": (_integer(1), "an integer of at least 1"),
    "temperature": (_number(0), "a number of at least 0 (0: greedy)"),
    "top_p": (_number(0, 1, open_low=True), "a number above 0 and up to 1 (1: off)"),
    "top_k": (_integer(0), "an integer of at least 0 (0: off)"),
    "min_p": (_number(0, 1), "a number from 0 to 1 (0: off)"),
    "repetition_penalty": (_number(0, open_low=True), "a number above 0 (1: off)"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2 (0: off)"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2 (0: off)"),
    "max_tokens": (_integer(1), "an integer of at least 1"),
    "min_tokens": (_integer(0), "an integer of at least 0"),
    "stop": (_each(lambda text: isinstance(text, str) and text != ""), "a list of non-empty strings"),
    "stop_token_ids": (_each(_TOKEN_ID), "a list of token ids"),
    "ignore_eos": (lambda value: isinstance(value, bool), "true or false"),
    "seed": (_optional(_integer(0, 2**63 - 1)), "an integer from 0 to 2**63 - 1, or none"),
    "logprobs": (_optional(_integer(0)), "an integer of at least 0 (how many alternatives per token), or none"),
    "logprob_token_ids": (_each(_TOKEN_ID), "a list of token ids"),
    "num_prompt_logprobs": (_integer(0), "an integer of at least 0"),
    "pool": (lambda value: isinstance(value, bool), "true or false"),
    "allowed_token_ids": (
        _optional(lambda value: bool(value) and _each(_TOKEN_ID)(value)),
        "a list of one or more token ids, or none",
    ),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn and when they end.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0, penalties 1, 0, 0 are off. `logprobs` k returns the
    log-probability of each sampled token and those of the k most probable ones, `num_prompt_logprobs` n those of the
    last n tokens of the prompt, and `logprob_token_ids` adds those of given tokens to each. `pool` returns the mean and
    the last of the hidden states. `seed` replaces the sampler's own seed for this request. Lists are taken as tuples
    and one stop string as a tuple of it. A bad value raises UserError.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    num_prompt_logprobs: int = 0
    pool: bool = False
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, (allowed, words) in _RULES.items():
            value = self.__dict__[name]
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not allowed(value):
                raise UserError(f"{name} is {value!r}, but must be {words}.")
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens is {self.min_tokens}, but must be at most max_tokens, which is {self.max_tokens}."
            )
        if self.n > 1 and (self.num_prompt_logprobs or self.pool):
            raise UserError(f"n is {self.n}, but num_prompt_logprobs and pool are for one sample of a prompt.")


@dataclass(frozen=True)
class Request:
    """`params.n` samples of one prompt, by the base model or, if `adapter` names one, by the base with that adapter."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_token_ids", tuple(self.prompt_token_ids))
        if not self.prompt_token_ids:
            raise UserError(f'The prompt of request "{self.id}" has no tokens; give it at least one.')


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    token_ids       the sampled tokens, the one that stopped it included
    finish_reason   "stop" (end token, stop id or stop string), "length" (max_tokens) or "abort"
    num_cached_tokens  prompt tokens whose keys and values were already there when it was first admitted
    logprobs        one entry per token, {"token_id", "logprob", "top": [[token id, logprob], ...], "asked": [logprob of
                    each of logprob_token_ids]}, if asked for
    prompt_logprobs the same for the last tokens of the prompt, as many as were asked for and have one before them
    vectors         [2, C] fp32 on the CPU, mean and last of the hidden states of all tokens but the very last, which
                    stops or is cut off before a pass sees it; if asked for
    """

    id: str
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    logprobs: list[dict] | None = None
    prompt_logprobs: list[dict] | None = None
    vectors: "Tensor | None" = None

    def to_json(self) -> dict:
        """The row that `python -m isheep.sampler` writes; what was not asked for is left out."""
        row = {name: value for name, value in self.__dict__.items() if value is not None}
        if self.vectors is not None:
            row["vectors"] = self.vectors.tolist()
        return row


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One sample of a request while it is computed. Compared and hashed by identity.

    token_ids            prompt and output; whoever samples appends here
    num_computed_tokens  how many of them have keys and values in the cache: those at positions 0 … n-1
    num_cached_tokens    how many of those were found there, not computed, when the sequence was first admitted
    block_table          cache block of positions 0 … block_size-1, of the next block_size positions, and so on
    arrival              position in the order of all sequences ever added
    salt                 what the keys and values depend on besides the tokens: adapter and its version
    block_keys           names of the full blocks of `token_ids` under `salt`, as far as they were needed (BlockManager)
    num_committed_blocks how many blocks of block_table were looked at for registration (BlockManager)
    """

    request: Request
    sample: int
    arrival: int
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    was_admitted: bool = False
    block_table: list[int] = field(default_factory=list)
    salt: object = None
    block_keys: list[bytes] = field(default_factory=list, repr=False)
    num_committed_blocks: int = 0

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def key(self) -> tuple[str, int]:
        return self.request.id, self.sample

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_cacheable_tokens(self) -> int:
        """How many tokens may be found in the cache: none whose hidden state is asked for, and never the last."""
        params = self.request.params
        if params.pool:
            return 0
        if params.num_prompt_logprobs:
            return max(0, self.num_prompt_tokens - 1 - params.num_prompt_logprobs)
        return self.num_tokens - 1

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def set_salt(self, salt: object) -> None:
        """Take the present salt before (re)computing from position 0; names made under another one are dropped."""
        assert not self.block_table, f"{self.key} still holds blocks computed under {self.salt}"
        if salt != self.salt:
            self.salt = salt
            self.block_keys.clear()
