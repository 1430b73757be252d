"""The tokenizer against transformers' on the shared vocabularies, and the incremental detokenizer against decode."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from isheep.config import UserError
from isheep.text.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from tests.tiny_tokenizer import SPECIAL_TOKENS, write_tiny_tokenizer

DATA = Path(__file__).parents[2] / "../shared/data"
FOLDERS = ("qwen1.5", "qwen3", "llama3", "tiny")

TEXTS = [
    "",
    " ",
    "  two  spaces\n\n\tand a tab \r\n",
    "It's 1234567 or 3.14159, they'LL say; naïve café — “quoted”…",
    "cafe\u0301 e\u0301",  # combining accents: Qwen composes them, Llama does not
    "你好，世界！今天天气很好。 日本語のテキスト 한국어",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 🏽 tone, 𝔘nicode",
    "<|im_start|>user\nhi<|im_end|>\n<|eot_id|>x<|end_of_text|><|endoftext|>",
    "ΑΒΓ абв שלום مرحبا नमस्ते ไทย",
    "def f(x):\n    return x ** 2  # comment\n",
    "\u00a0\u3000 \u200b zero\ufeffwidth",
]


def corpus() -> list[str]:
    rows = [json.loads(line) for line in (DATA / "self_instruct/seed_tasks.jsonl").read_text().split("\n") if line]
    wiki = (DATA / "text/wikitext-2_test.txt").read_text()[:200_000]
    return TEXTS + [row["instances"][0]["output"] for row in rows] + wiki.split("\n")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def push_all(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special)
    return "".join([detokenizer.push(i) for i in ids]) + detokenizer.finish()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared tokenizers")
@pytest.mark.parametrize("name", FOLDERS)
def test_same_ids_and_text_as_transformers(name):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = DATA / "tokenizers" / name
    theirs = (AutoTokenizer if name == "qwen1.5" else PreTrainedTokenizerFast).from_pretrained(folder)
    ours = load_tokenizer(folder)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    for text in corpus():
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            want = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip) == want == push_all(ours, ids, skip)


def test_special_text_is_one_token_and_nothing_is_added(tiny):
    assert tiny.vocab_size == 320
    assert tiny.eos_token_id == tiny.token_id("<|im_end|>") == tiny.encode("<|im_end|>")[0]
    assert len(tiny.encode("a<|im_end|>")) == 2
    assert tiny.encode("") == []
    assert tiny.token_id("<|no such token|>") is None
    assert tiny.special_ids == {tiny.token_id(token) for token in SPECIAL_TOKENS}
    assert tiny.decode(tiny.encode("a<|im_end|>b")) == "ab"
    assert tiny.decode(tiny.encode("a<|im_end|>b"), skip_special=False) == "a<|im_end|>b"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 325), max_size=40), st.booleans())
def test_detokenizer_adds_up_to_decode_on_any_bytes(tiny, ids, skip):
    assert push_all(tiny, ids, skip) == tiny.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_detokenizer_gives_whole_characters_only(tiny, text):
    detokenizer = Detokenizer(tiny)
    pieces = [detokenizer.push(i) for i in tiny.encode(text)]
    assert "".join(pieces) == text and detokenizer.finish() == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_detokenizer_flushes_a_cut_character(tiny):
    detokenizer = Detokenizer(tiny)
    assert [detokenizer.push(i) for i in tiny.encode("😀")[:3]] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def sentencepiece() -> Tokenizer:
    """A Llama-2-like vocabulary: pieces of text with "▁" for the space, and single bytes."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "a", "b", "▁a", "▁ab", "é", "▁."]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, backend.token_to_id("</s>"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(258, 265), st.sampled_from([0, 1, 2 + 0xC3, 2 + 0xA9, 2 + 0x41])), max_size=30))
def test_detokenizer_adds_up_to_decode_on_sentencepiece(ids):
    tokenizer = sentencepiece()
    assert push_all(tokenizer, ids) == tokenizer.decode(ids)


def test_eos_from_table_and_from_the_model_configs(tmp_path):
    write_tiny_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|eot_id|>", "lstrip": False}}))
    assert load_tokenizer(tmp_path).eos_token == "<|eot_id|>"

    config.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 314}))
    assert load_tokenizer(tmp_path).eos_token == "<|endoftext|>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [316, 314]}))
    assert load_tokenizer(tmp_path).eos_token == "<|im_end|>"


def test_lengths_in_the_file_do_not_cut_texts(tmp_path):
    write_tiny_tokenizer(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a long enough text")) == "a long enough text"


def break_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')


def forget_eos(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


def wrong_class(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")


def wrong_added_id(folder: Path) -> None:
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"400": {"content": "<|new|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def broken_added(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"400": "<|new|>"}}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "has no tokenizer"),
        (break_json, "cannot be read"),
        (forget_eos, "names no end token"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "JSON object"),
        (wrong_class, "Qwen2Tokenizer"),
        (wrong_added_id, "different models"),
        (broken_added, "cannot be read"),
    ],
)
def test_missing_and_broken_files_are_one_sentence(tmp_path, spoil, said):
    write_tiny_tokenizer(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
