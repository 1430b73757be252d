"""A byte-level BPE of exactly 320 ids, written to a folder: bytes 0..255, 58 merges, 6 special tokens.

It can encode any text, so tests of the sampler, the trainer and the loop need no downloaded tokenizer.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
# Left and right part of each merge; "Ġ" is the byte-level name of the space.
MERGES = (
    "Ġ t|h e|i n|r e|o n|a t|e n|o r|e s|i s|a n|i t|e r|a l|o u|Ġ a|Ġ s|Ġ w|Ġ o|Ġ b|Ġ f|Ġ m|Ġ c|Ġ p|Ġ d|"
    "Ġt he|in g|Ġa n|n d|Ġo f|Ġt o|Ġ in|Ġ is|e d|l e|s t|a r|l y|c h|s h|t h|q u|u r|o m|i c|v e|l l|o o|"
    "Ġ y|Ġy ou|Ġf or|I n|In st|u c|t i|ti on|p u|Ġ Ġ"
)


def write_tiny_tokenizer(folder: Path, eos: str = "<|im_end|>") -> None:
    """Write tokenizer.json and tokenizer_config.json; `eos` is one of SPECIAL_TOKENS."""
    assert eos in SPECIAL_TOKENS
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build()
    assert tokenizer.get_vocab_size() == 320
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _build() -> Tokenizer:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split(" ")) for merge in MERGES.split("|")]
    pieces += [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer
