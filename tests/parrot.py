"""A real checkpoint that plays its part in the loop: it writes items that parse, answers, and rates.

It is a bigram model in the shape of a Llama: the embedding is the identity, every layer adds nothing, and the head
holds the logarithm of a table "after this token come those". The tokenizer's added tokens are whole pieces of the
loop's text, one set per item number, so that the table can count. Nothing is trained; adapters on it can be.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_EXAMPLES = 2  # its prompts must show so many: it goes on with item 3
NUMBERS = range(NUM_EXAMPLES + 1, NUM_EXAMPLES + 7)
STEMS = "amber basin cedar delta ember fable grove harbor island juniper kettle lantern".split()
NUM_HIDDEN, NUM_LAYERS = 384, 2

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": NUM_HIDDEN,
    "hidden_size": NUM_HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def table() -> dict[str, dict[str, float]]:
    """Token -> what may come after it, with probabilities. A token that is not here ends the text."""
    follows: dict[str, dict[str, float]] = {}
    for n in NUMBERS:
        words = [f" {stem}{n}" for stem in STEMS]
        entry, field, end = f"{n}. Instruction:", f".\n{n}. Input:\n", f"<noinput>\n###\n{n + 1}. Instruction:"
        follows[entry] = dict.fromkeys(words, 1 / len(words))
        for word in words:
            follows[word] = dict.fromkeys(words, 0.88 / len(words)) | {field: 0.12}
        follows[field] = {end: 1.0}
        if n + 1 in NUMBERS:
            follows[end] = dict.fromkeys([f" {stem}{n + 1}" for stem in STEMS], 1 / len(STEMS))
    says = [f" {stem}" for stem in STEMS]
    follows["\n"] = dict.fromkeys(says, 1 / len(says))  # every prompt for an answer ends with a line break
    for word in says:
        follows[word] = dict.fromkeys(says, 0.9 / len(says)) | {"<|im_end|>": 0.1}
    follows[" score is:"] = {" 9||": 0.55, " 10||": 0.25, " 6||": 0.1, " hmm": 0.1}
    for rated in follows[" score is:"]:
        follows[rated] = dict.fromkeys(says, 1 / len(says))
    return follows


def write_parrot(folder: Path) -> Path:
    """The checkpoint's folder: config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    ids = {token: _id(tokenizer, token) for token in [*table(), *(t for after in table().values() for t in after)]}
    config = {**CONFIG, "eos_token_id": ids["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(ids), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokenizer() -> Tokenizer:
    """The 256 bytes, and each token of the table as it stands."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    follows = table()
    texts = dict.fromkeys([*follows, *(text for after in follows.values() for text in after)])
    added = [text for text in texts if len(text) > 1 and text not in SPECIAL]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    assert tokenizer.get_vocab_size() <= NUM_HIDDEN
    return tokenizer


def _id(tokenizer: Tokenizer, text: str) -> int:
    (token_id,) = tokenizer.encode(text, add_special_tokens=False).ids
    return token_id


def _weights(ids: dict[str, int]) -> dict[str, torch.Tensor]:
    """Logits after token x are the head's column x times sqrt(hidden size), the norm of a one-hot row."""
    head = torch.full((NUM_HIDDEN, NUM_HIDDEN), -30.0)
    head[ids["<|im_end|>"]] = 0.0
    for token, after in table().items():
        head[:, ids[token]] = -30.0
        for text, probability in after.items():
            head[ids[text], ids[token]] = math.log(probability)
    tensors = {
        "model.embed_tokens.weight": torch.eye(NUM_HIDDEN),
        "model.norm.weight": torch.ones(NUM_HIDDEN),
        "lm_head.weight": head / math.sqrt(NUM_HIDDEN),
    }
    generator = torch.Generator().manual_seed(0)
    kv, inner = NUM_HIDDEN // 3, CONFIG["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (NUM_HIDDEN, NUM_HIDDEN),
        "self_attn.k_proj": (kv, NUM_HIDDEN),
        "self_attn.v_proj": (kv, NUM_HIDDEN),
        "mlp.gate_proj": (inner, NUM_HIDDEN),
        "mlp.up_proj": (inner, NUM_HIDDEN),
    }
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}."
        for name, shape in shapes.items():
            tensors[f"{layer}{name}.weight"] = 0.1 * torch.randn(*shape, generator=generator)  # type: ignore[call-overload]
        tensors[f"{layer}self_attn.o_proj.weight"] = torch.zeros(NUM_HIDDEN, NUM_HIDDEN)  # nothing is added
        tensors[f"{layer}mlp.down_proj.weight"] = torch.zeros(NUM_HIDDEN, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = torch.ones(NUM_HIDDEN)
    return tensors
