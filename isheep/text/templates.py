"""How an instruction becomes the model's prompt: the one place, for generation, training and evaluation alike.

`raw` for base models; `chatml`, `llama3` and `alpaca` for tuned ones. Instruction and input are joined by a line break
everywhere. The paper trains and samples its Qwen models with ChatML (its name there is qwen_like).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isheep.config import UserError, did_you_mean
from isheep.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Template:
    """The text around each turn of a conversation, and what ends the model's own turn."""

    name: str
    turns: Mapping[str, tuple[str, str]]  # role -> text before and after the content
    opening: str  # opens the assistant's turn, where the model goes on
    system: str = ""  # opens every conversation without a system turn of its own; "" for none
    stop: tuple[str, ...] = ()  # texts that end the model's turn
    end_token: str | None = None  # what a trained response ends with; None: the tokenizer's own end token
    joint: str = "\n"  # between instruction and input

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text after which the model answers one instruction."""
        return self._render([{"role": "user", "content": self.content(instruction, input)}])

    def content(self, instruction: str, input: str = "") -> str:
        """What the user says in it."""
        return instruction + self.joint + input if input else instruction

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text after which the model answers the last of `messages` [{role, content}]; UserError for bad ones."""
        self._check(messages)
        return self._render(messages)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        around = [(self.turns[message["role"]], message["content"]) for message in messages]
        return "".join(before + text + after for (before, after), text in around) + self.opening

    def _check(self, messages: Sequence[Mapping[str, str]]) -> None:
        if not messages:
            raise UserError("a conversation needs at least one message, but the list is empty.")
        for message in messages:
            if message.get("role") not in self.turns:
                role = str(message.get("role"))
                raise UserError(f'a message has the role "{role}".{did_you_mean(role, self.turns)}')
            content = message.get("content")
            if not isinstance(content, str) or not content.strip():
                raise UserError(f'a message of role "{message["role"]}" has no text: give it some as "content".')
        if messages[-1]["role"] != "user":
            raise UserError(f'the last message is of role "{messages[-1]["role"]}": end with one of role "user".')

    def end_token_id(self, tokenizer: Tokenizer) -> int:
        """The token that a trained response ends with."""
        if self.end_token is None:
            return tokenizer.eos_token_id
        token_id = tokenizer.token_id(self.end_token)
        if token_id is None:
            raise UserError(
                f'template "{self.name}" ends a response with "{self.end_token}", which this model\'s tokenizer does '
                "not have: choose the template that the model was trained with."
            )
        return token_id

    def stop_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end the model's turn, sorted: the trained end token always, so that training can be heard."""
        ids = [tokenizer.token_id(text) for text in self.stop]
        stops = {token_id for token_id in ids if token_id is not None and token_id in tokenizer.special_ids}
        return tuple(sorted(stops | {tokenizer.eos_token_id, self.end_token_id(tokenizer)}))

    def encode_row(self, tokenizer: Tokenizer, row: Mapping[str, str], cutoff: int) -> tuple[list[int], list[int]]:
        """A training row as (prompt ids, response ids with the end token), `cutoff` tokens together at most.

        `row` is {instruction, input, output}. Each part keeps its beginning; a response that is cut loses its end
        token, so the model does not learn to stop in mid-sentence.
        """
        prompt_ids = tokenizer.encode(self.prompt(row["instruction"], row["input"]))
        response_ids = [*tokenizer.encode(row["output"]), self.end_token_id(tokenizer)]
        prompt_len, response_len = cut_lengths(len(prompt_ids), len(response_ids), cutoff)
        return prompt_ids[:prompt_len], response_ids[:response_len]


def cut_lengths(prompt_len: int, response_len: int, cutoff: int) -> tuple[int, int]:
    """Lengths after truncation to `cutoff` tokens together, by the paper's rule (its training details).

    A response of at most half the cutoff stays whole and the prompt is cut; else the same the other way round; else
    both are cut in proportion. A part that had tokens keeps at least one wherever `cutoff` is 2 or more.
    """
    if prompt_len + response_len <= cutoff:
        return prompt_len, response_len
    if 2 * response_len <= cutoff:
        return cutoff - response_len, response_len
    if 2 * prompt_len <= cutoff:
        return prompt_len, cutoff - prompt_len
    share = cutoff * response_len // (prompt_len + response_len)
    kept = min(max(share, 1), max(cutoff - 1, 1))  # both parts are longer than half the cutoff here
    return cutoff - kept, kept


def _llama3_turn(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


_ROLES = ("system", "user", "assistant")

TEMPLATES: dict[str, Template] = {
    each.name: each
    for each in (
        Template("raw", turns={role: ("", "\n") for role in _ROLES}, opening=""),
        Template(
            "chatml",
            turns={role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in _ROLES},
            opening="<|im_start|>assistant\n",
            system="You are a helpful assistant.",
            stop=("<|im_end|>", "<|endoftext|>"),
        ),
        Template(
            "llama3",
            turns={role: _llama3_turn(role) for role in _ROLES},
            opening=_llama3_turn("assistant")[0],
            stop=("<|eot_id|>",),
            end_token="<|eot_id|>",
        ),
        Template(
            "alpaca",
            turns={
                "system": ("", "\n\n"),
                "user": ("### Instruction:\n", "\n\n"),
                "assistant": ("### Response:\n", "\n\n"),
            },
            opening="### Response:\n",
            system="Here is a task for you. Write a response that does what it asks.",
            joint="\n\n### Input:\n",
        ),
    )
}


def template(name: str) -> Template:
    """The template called `name`; UserError with the nearest name where there is none."""
    if name not in TEMPLATES:
        raise UserError(f'there is no template "{name}".{did_you_mean(name, TEMPLATES)}')
    return TEMPLATES[name]
