"""Import of GGUF files written here, with q and k interleaved as llama.cpp's converter leaves them."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend

from isheep.config import UserError
from isheep.model import gguf as importer
from isheep.model.gguf import import_gguf
from isheep.model.weights import load_model, resolve
from isheep.text.tokenizer import load_tokenizer
from tests.tiny import tiny_model
from tests.tiny_tokenizer import SPECIAL_TOKENS, write_tiny_tokenizer

gguf = pytest.importorskip("gguf")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
F32, F16, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_1"))
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehlnorstw"]
PIECES += [
    "▁a",
    "he",
    "▁the",
    "the",
    "▁s",
    "es",
    "th",
    "▁t",
    "ab",
    "abc",
    "bc",
    "▁w",
    "or",
    "ld",
    "wor",
    "▁▁",
    "tt",
    "ttt",
]


def interleaved(weight, heads):
    """Halves to pairs: the row order of llama.cpp."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def source_names(model):
    """(GGUF name, array) of every parameter."""
    back = {hf: ggml for ggml, hf in {**importer.TOP, **importer.IN_LAYER}.items()}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        stem = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, layer, leaf = stem.split(".", 3)
            heads = {"self_attn.q_proj": SHAPE["num_attention_heads"], "self_attn.k_proj": SHAPE["num_key_value_heads"]}
            yield f"blk.{layer}.{back[leaf]}.weight", interleaved(array, heads[leaf]) if leaf in heads else array
        else:
            yield f"{back[stem]}.weight", array


def write_gguf(path, model, kind=F32, arch="llama", tokenizer="gpt2", extra=(), change=lambda writer: None):
    """`kind` is what matrices are stored as; norms are always F32. `extra`: more (name, array) tensors."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    add_byte_level(writer, path.parent) if tokenizer == "gpt2" else add_sentencepiece(writer)
    change(writer)
    for name, array in (*source_names(model), *extra):
        stored = kind if array.ndim == 2 else F32
        writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_level(writer, folder, pre="smollm"):
    write_tiny_tokenizer(folder / "tiny")
    raw = json.loads((folder / "tiny" / "tokenizer.json").read_text())
    tokens = [*raw["model"]["vocab"], *SPECIAL_TOKENS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL_TOKENS else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template("{{ messages }}")


def add_sentencepiece(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)])
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(PIECES) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize(("kind", "step"), [(F32, 0), (F16, 2**-11), (Q8_0, 2**-6), (Q4_1, 2**-3)], ids=str)
def test_weights_come_back(kind, step, tmp_path):
    model = tiny_model(**SHAPE)
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", model, kind), tmp_path)
    got = load_model(folder, torch.float32, "cpu")
    assert got.config.rms_norm_eps == 1e-5 and got.config.rope_theta == 5000.0
    for (name, ours), (_, expected) in zip(got.named_parameters(), model.named_parameters(), strict=True):
        error = (ours - expected).abs().max() / expected.abs().max()
        assert error <= step if ours.ndim == 2 else error == 0, name
    stored = {t.dtype for t in load_file(folder / "model.safetensors").values() if t.ndim == 2}
    assert stored == {{F32: torch.float32, F16: torch.float16}.get(kind, torch.bfloat16)}


def test_the_output_is_a_proper_safetensors_file(tmp_path):
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE), Q8_0), tmp_path)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == dict(tiny_model(**SHAPE).named_parameters()).keys()


@pytest.mark.parametrize("stored", [False, True], ids=["left out", "stored twice"])
def test_a_tied_head(stored, tmp_path):
    model = tiny_model(tie_word_embeddings=True, **SHAPE)
    twice = [("output.weight", model.head.weight.detach().numpy())] if stored else []
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", model, extra=twice), tmp_path)
    assert load_model(folder, torch.float32, "cpu").config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_it_is_imported_once(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = resolve(path)
    assert first.parent == tmp_path / "cache" / "isheep" / "models"
    monkeypatch.setattr(importer, "_read", None)
    assert resolve(str(path)) == first
    moved = path.rename(tmp_path / "cache" / "m.gguf")
    assert resolve(moved) == first
    monkeypatch.undo()
    assert import_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(seed=1, **SHAPE)), first.parent) != first
    assert sorted(p.name for p in first.parent.iterdir() if p.name.startswith(".")) == []


def test_two_processes_at_once_both_get_the_model(tmp_path, monkeypatch):
    path, cache = write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE)), tmp_path / "cache"
    convert, others = importer._convert, []

    def convert_and_lose_the_race(source, folder):
        convert(source, folder)
        monkeypatch.setattr(importer, "_convert", convert)
        others.append(import_gguf(path, cache))

    monkeypatch.setattr(importer, "_convert", convert_and_lose_the_race)
    assert others == [import_gguf(path, cache)] == list(cache.iterdir())
    load_model(others[0], torch.float32, "cpu")


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    path, cache = write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE)), tmp_path / "cache"
    monkeypatch.setattr(importer, "_tensor", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, cache)
    assert list(cache.iterdir()) == []


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_byte_level_tokenizer(tmp_path):
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE)), tmp_path)
    tokenizer = load_tokenizer(folder)
    expected = Backend.from_file(str(tmp_path / "tiny" / "tokenizer.json"))
    for text in ("the instruction, you and I", "<|im_start|>user\nTell<|im_end|>\n", "Ünï 你好 🙂  \t\n x", ""):
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["add_bos_token"] is False


def sentencepiece(text):
    """The slow twin: join the neighbours with the best score, leftmost first, until none is a piece; then bytes."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(PIECES.index(a + b), i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]
        if not joined:
            break
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for part in parts for i in ([PIECES.index(part)] if part in PIECES else [3 + b for b in part.encode()])]


def test_sentencepiece_tokenizer(tmp_path):
    model = tiny_model(vocab_size=len(PIECES), **SHAPE)
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", model, tokenizer="llama"), tmp_path)
    tokenizer = load_tokenizer(folder)
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("aabcehttthes  wWorldé🙂\n"), size=rng.integers(1, 30)))
        ids = tokenizer.encode(text)
        assert ids == sentencepiece(text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a</s>")[-1] == tokenizer.eos_token_id == 2
    with_bos = Backend.from_file(str(folder / "tokenizer.json")).encode("a")  # what transformers would feed it
    assert with_bos.ids == [1, *tokenizer.encode("a")]


def test_transformers_reads_the_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(**SHAPE)
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(theirs.state_dict()[name], p) for name, p in model.named_parameters())
    assert theirs.config.rope_parameters["rope_theta"] == 5000.0
    text = "<|im_start|>user\nIs 42 the end?<|im_end|>"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == load_tokenizer(folder).encode(text)


# ---- bad files -------------------------------------------------------------------------------------------------------


def test_a_torn_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE))
    whole = path.read_bytes()
    for keep in (0, 3, 100, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"m\.gguf is not a whole GGUF file"):
            import_gguf(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, 'architecture "qwen2"; only "llama"'),
        ({"extra": [("blk.0.attn_q.bias", np.zeros(64, np.float32))]}, r'tensor "blk\.0\.attn_q\.bias"'),
        ({"extra": [("rope_freqs.weight", np.zeros(8, np.float32))]}, "scales its rotary embedding"),
        ({"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "scales its rotary embedding"),
        ({"change": lambda w: w.add_tokenizer_model("bert")}, 'tokenizer of the kind "bert"'),
        ({"change": lambda w: w.add_tokenizer_pre("llama-bpe")}, 'splits text the way of "llama-bpe"'),
        (
            {"change": lambda w: w.kv_data[0].pop("llama.feed_forward_length")},
            'lacks the field "llama.feed_forward_length"',
        ),
        ({"change": lambda w: w.kv_data[0].pop("tokenizer.ggml.eos_token_id")}, "eos_token_id"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicated key name")
def test_what_cannot_be_imported(options, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE), **options)
    with pytest.raises(UserError, match=message):
        import_gguf(path, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_without_the_gguf_package(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        import_gguf(path, tmp_path)


def test_an_unwritable_cache(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cache"):
        import_gguf(write_gguf(tmp_path / "m.gguf", tiny_model(**SHAPE)), tmp_path / "cache" / "models")
