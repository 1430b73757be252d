"""Text to token ids and back, from the tokenizer files of a model folder.

A thin wrapper of `tokenizers`. Two layouts are read: `tokenizer.json`, and the `vocab.json` + `merges.txt` that Qwen
publishes. `tokenizer_config.json` adds the special tokens and names the end token.
"""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from isheep.config import UserError

T = TypeVar("T")

# Qwen's split of text into words, digits one by one, punctuation and white space; BPE merges within these only.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes and decodes; knows its end token. Made by `load_tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_id: int) -> None:
        eos_token = backend.id_to_token(eos_token_id)
        assert eos_token is not None, f"no token has the id {eos_token_id}"
        # A tokenizer.json may carry the lengths of someone's training run; here nothing is ever cut or padded.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_id = eos_token_id
        self.eos_token = eos_token
        self.vocab_size: int = backend.get_vocab_size()
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Adds no BOS or EOS; the text of a special token becomes that token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int], skip_special: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special)

    def token_id(self, text: str) -> int | None:
        """The id of the one token spelled `text`, special or not; None where there is no such token."""
        return self.backend.token_to_id(text)


class Detokenizer:
    """The text of ids that arrive one by one: what `push` and `finish` return adds up to `Tokenizer.decode(all ids)`.

    Each push costs the same however long the text is. A character that is spread over several tokens comes with the
    last of them. Two kinds of vocabulary exist: byte-level, whose pieces spell bytes, and SentencePiece's, whose
    pieces are text except for single bytes "<0x0A>".
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._last_id: list[int] = []  # the last id whose text is out: whether a space opens a piece depends on it
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that becomes certain with `token_id`; "" while a character is incomplete."""
        piece = self._tokenizer.backend.id_to_token(token_id)
        if piece is None or token_id in self._skipped:  # None: a row of the embedding that no token owns
            return ""
        if self._byte_level:
            return self._utf8.decode(_piece_bytes(piece))
        self._held.append(token_id)
        # A run of byte pieces is decoded as a whole, so it must end before its text is known.
        return "" if _is_byte_piece(piece) else self._release()

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True) if self._byte_level else self._release()

    def _release(self) -> str:
        """Text of the held ids, decoded after the last one that is out."""
        if not self._held:
            return ""
        before = self._decode(self._last_id)
        text = self._decode(self._last_id + self._held)[len(before) :]
        self._last_id, self._held = self._held[-1:], []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special=False)


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE's spelling of bytes: printable Latin-1 is itself, the rest is U+0100 onwards, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece. An added token with other characters, such as a space, stands for itself."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in piece)
    except KeyError:
        return piece.encode()


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read the tokenizer of a model folder; UserError where its files are missing, broken, or name no end token."""
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = _parse(folder / "tokenizer.json", lambda path: tokenizers.Tokenizer.from_file(str(path)))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocab_and_merges(folder, config)
    else:
        raise UserError(f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt.")
    _add_tokens(backend, config, folder)
    return Tokenizer(backend, _eos_token_id(backend, config, folder))


def _from_vocab_and_merges(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    kind = config.get("tokenizer_class", "")
    if not kind.startswith("Qwen2"):  # the two files do not say how text is split, the class does
        raise UserError(
            f'{folder} has vocab.json and merges.txt of tokenizer class "{kind}", but without a tokenizer.json '
            "only those of Qwen2Tokenizer can be read: add the model's tokenizer.json."
        )
    bpe = _parse(folder / "vocab.json", lambda path: models.BPE.from_file(str(path), str(folder / "merges.txt")))
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Add the tokens that tokenizer_config.json lists with an id, then the ones it only names as special."""
    path = folder / "tokenizer_config.json"
    listed, named = _parse(path, lambda _: (_listed_tokens(config), _named_tokens(config)))
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in listed:
        if token.content not in known:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise UserError(
                f'{path} gives "{token.content}" the id {token_id}, but in the vocabulary it is '
                f"{backend.token_to_id(token.content)}: the files belong to different models."
            )
    known |= {token.content for _, token in listed}
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in named if text not in known]
    )


def _listed_tokens(config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    listed = config.get("added_tokens_decoder", {})
    options = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = {int(i): AddedToken(t["content"], **{k: t[k] for k in options if k in t}) for i, t in listed.items()}
    return sorted(tokens.items(), key=lambda item: item[0])


def _named_tokens(config: dict[str, Any]) -> list[str]:
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    texts = [_text(config.get(f"{role}_token")) for role in roles]
    texts += [_text(token) for token in config.get("additional_special_tokens") or []]
    return [text for text in texts if text is not None]


def _eos_token_id(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> int:
    """Id of the end token: tokenizer_config.json's, else the first one of generation_config.json or config.json."""
    name = _text(config.get("eos_token"))
    if name is not None:
        token_id = backend.token_to_id(name)
        assert token_id is not None, "`_add_tokens` adds the tokens that the config names"
        return token_id
    for file in ("generation_config.json", "config.json"):
        eos = _read_json(folder / file).get("eos_token_id")
        first = eos[0] if isinstance(eos, list) and eos else eos
        if isinstance(first, int) and backend.id_to_token(first) is not None:
            return first
    raise UserError(f'{folder} names no end token: write it as "eos_token" into its tokenizer_config.json.')


def _text(token: str | dict[str, Any] | None) -> str | None:
    """A special token is written as its text, or as a table with the text in "content"."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The table in `path`; empty where the file is absent, since each of these files is optional."""
    if not path.is_file():
        return {}
    value = _parse(path, lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}: copy the model's files again.")
    return value


def _parse(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except Exception as error:  # `tokenizers` raises nothing more special than Exception
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}): copy the model's files again."
        ) from error
