"""Import of a GGUF file: its weights as safetensors, its tokenizer as tokenizer.json, once, in a cache.

Written for the files that small Llama models are published as. Quantised weights become bfloat16, others keep their
type. The `gguf` package reads and dequantises; what is done here is to put names, rows and the tokenizer back.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from isheep.artifacts import sha256_file, writes_to
from isheep.config import UserError
from isheep.log import log

FORMAT = 1  # part of the cache's key: raised when what is written changes
STORED = {"F32": ("F32", torch.float32), "F16": ("F16", torch.float16)}  # GGUF type -> stored as; others: BF16
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type


def import_gguf(path: Path, cache_dir: Path) -> Path:
    """The folder in `cache_dir` with `path` as config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Its name holds the sha256 of the file, so that another file is another import. Raises UserError where the file is
    damaged, not a Llama model, or the `gguf` package is absent.
    """
    try:
        target = cache_dir / f"{path.stem}-{sha256_file(path)[:16]}-v{FORMAT}"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): copy or download it again.") from error
    if target.is_dir():
        return target
    source = _read(path)
    log.info("importing %s into %s, once", path.name, target)
    with writes_to(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".import-") as scratch:
            part = Path(scratch) / "model"
            part.mkdir()
            _convert(source, part)
            try:
                part.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first, with the same bytes
                    raise
    return target


@dataclass(frozen=True)
class Source:
    """An open GGUF file: its key/value fields, its tensors by name, and the package that reads them."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Any]  # gguf.ReaderTensor, memory-mapped
    gguf: ModuleType

    def need(self, key: str) -> Any:
        if key not in self.fields:
            raise UserError(f'{self.path} lacks the field "{key}": it is not a whole model.')
        return self.fields[key]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: left out, or written a second time."""
        head, embedding = self.tensors.get("output.weight"), self.tensors["token_embd.weight"]
        return head is None or (head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data))


def _read(path: Path) -> Source:
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path.name} needs the package that reads GGUF: run `pip install gguf`.") from error
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): copy or download it again.") from error
    source = Source(path, fields, {t.name: t for t in reader.tensors}, gguf)
    _refuse_unknown(source)
    return source


def _refuse_unknown(source: Source) -> None:
    """UserError for what would be imported wrongly: another architecture, scaled rope, a tensor without a place."""
    kind, path = source.need("general.architecture"), source.path
    if kind != "llama":
        raise UserError(f'{path} holds a model of architecture "{kind}"; only "llama" can be imported.')
    if source.fields.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in source.tensors:
        raise UserError(f"{path} scales its rotary embedding, which the import does not: take the model's safetensors.")
    unknown = [name for name in source.tensors if _checkpoint_name(name) is None]
    if unknown:
        raise UserError(f'{path} has a tensor "{unknown[0]}", which no plain Llama model has: it cannot be imported.')
    if "token_embd.weight" not in source.tensors:
        raise UserError(f'{path} lacks the tensor "token_embd.weight": it is not a whole model.')


def _convert(source: Source, folder: Path) -> None:
    config = _config(source)
    tokenizer, tokenizer_config = _tokenizer(source)
    _write_weights(source, config, folder / "model.safetensors")
    for name, table in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


# ---- weights -------------------------------------------------------------------------------------------------------


def _config(source: Source) -> dict[str, Any]:
    """config.json, as transformers writes it for LlamaForCausalLM."""
    need, fields = source.need, source.fields
    heads, width = need("llama.attention.head_count"), need("llama.embedding_length")
    kinds = {t.tensor_type.name for t in source.tensors.values()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(source.tensors["token_embd.weight"].shape[-1]),  # GGUF writes shapes innermost first
        "hidden_size": width,
        "intermediate_size": need("llama.feed_forward_length"),
        "num_hidden_layers": need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", width // heads),
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(need("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(fields.get("llama.rope.freq_base", 10000.0)),
        "max_position_embeddings": need("llama.context_length"),
        "tie_word_embeddings": source.tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": need("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32" if kinds == {"F32"} else "bfloat16",
    }


def _decimal(x: float) -> float:
    """The number that was meant by an fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _checkpoint_name(name: str) -> str | None:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; None for a tensor that Llama does not have."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in IN_LAYER:
        return f"model.layers.{layer[1]}.{IN_LAYER[layer[2]]}.weight"
    top = TOP.get(name.removesuffix(".weight"))
    return f"{top}.weight" if top and name.endswith(".weight") else None


def _tensor(source: Source, name: str, config: dict[str, Any]) -> Tensor:
    """One tensor, dequantised, (out, in), in the dtype it is stored in."""
    stored = source.tensors[name]
    _, dtype = STORED.get(stored.tensor_type.name, ("BF16", torch.bfloat16))
    tensor = torch.from_numpy(np.array(source.gguf.dequantize(stored.data, stored.tensor_type), dtype=np.float32))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(name.split(".")[-2])
    return (_to_halves(tensor, heads) if heads else tensor).to(dtype)


def _to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k from GGUF's interleaved rotary pairs (0, 1), (2, 3), … back to halves (0, D/2), (1, D/2 + 1), …"""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _write_weights(source: Source, config: dict[str, Any], path: Path) -> None:
    """model.safetensors, one tensor in memory at a time: its header can be written before any of them is made."""
    left_out = "output.weight" if config["tie_word_embeddings"] else None
    names = {name: str(_checkpoint_name(name)) for name in source.tensors if name != left_out}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, target in names.items():
        tensor = source.tensors[name]
        kind, dtype = STORED.get(tensor.tensor_type.name, ("BF16", torch.bfloat16))
        start, end = end, end + int(tensor.n_elements) * dtype.itemsize
        header[target] = {"dtype": kind, "shape": tensor.shape[::-1].tolist(), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_tensor(source, name, config).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def _tokenizer(source: Source) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and its tokenizer_config.json."""
    kind, fields = source.need("tokenizer.ggml.model"), source.fields
    builders: dict[str, Callable[[Source], tokenizers.Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(f'{source.path} has a tokenizer of the kind "{kind}"; only gpt2 and llama can be imported.')
    tokenizer = builders[kind](source)
    tokens, types = source.need("tokenizer.ggml.tokens"), source.need("tokenizer.ggml.token_type")
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (UNKNOWN, CONTROL)]
    added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    ids = {role: fields.get(f"tokenizer.ggml.{word}_token_id")
           for role, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    named = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": "bos_token" in named and fields.get("tokenizer.ggml.add_bos_token", kind == "llama"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.need("llama.context_length"),
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    if config["add_bos_token"]:
        bos, bos_id = config["bos_token"], ids["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer, config


def _byte_level(source: Source) -> tokenizers.Tokenizer:
    """Byte-level BPE as SmolLM splits text: digits one by one, then GPT-2's pattern."""
    split = source.fields.get("tokenizer.ggml.pre", "default")
    if split != "smollm":  # a wrong split of text into words would go unnoticed
        raise UserError(f'{source.path} splits text the way of "{split}"; only that of "smollm" can be imported.')
    vocab = {token: i for i, token in enumerate(source.need("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in source.need("tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(source: Source) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: of all neighbours that make a piece, the pair with the best score is joined first.

    So each way to cut a piece in two is a merge, ranked by the piece's score. Unknown characters become bytes.
    """
    tokens, scores = source.need("tokenizer.ggml.tokens"), source.need("tokenizer.ggml.scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for piece, score in zip(tokens, scores, strict=True):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        ranked += [(-score, vocab[a], vocab[b], (a, b)) for a, b in cuts if a in vocab and b in vocab]
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = tokens[source.fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    to_mark = normalizers.Replace(" ", "▁")
    from_mark = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if source.fields.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_mark])
        tokenizer.decoder = decoders.Sequence([*from_mark, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer, tokenizer.decoder = to_mark, decoders.Sequence(from_mark)
    return tokenizer
