"""A model's shape, read from its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isheep.config import UserError, did_you_mean

# What differs between the architectures: bias on q, k, v, and a norm on each query and key head.
ARCHITECTURES = {
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False},
}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Names as in config.json where it has one. `context_len` is the longest sequence, a sliding window counted in."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    context_len: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json. Raises UserError for an architecture, activation or rope this decoder does not have."""
        name = (raw.get("architectures") or ["(none)"])[0]
        if name not in ARCHITECTURES:
            raise UserError(
                f'The checkpoint\'s architecture "{name}" is not supported.{did_you_mean(name, ARCHITECTURES)}'
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f'The checkpoint uses the activation "{raw["hidden_act"]}"; only "silu" is supported.')
        missing = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers") if k not in raw]
        missing += [k for k in ("num_attention_heads",) if k not in raw]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}: the checkpoint's folder is not complete.")
        heads = raw["num_attention_heads"]
        theta, scaling = _rope(raw)
        bias = bool(raw.get("attention_bias", False))
        eos = raw.get("eos_token_id")
        return cls(
            architecture=name,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=ARCHITECTURES[name]["qkv_bias"] or bias,
            out_bias=bias,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=ARCHITECTURES[name]["qk_norm"],
            context_len=_context_len(raw),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )


def _rope(raw: Mapping[str, Any]) -> tuple[float, Mapping[str, Any] | None]:
    """(base, scaling or None), from `rope_theta` + `rope_scaling` or, in newer files, `rope_parameters`."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(raw.get("rope_theta") or scaling.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UserError(f'The checkpoint\'s rope scaling "{kind}" is not supported.{did_you_mean(kind, ROPE_TYPES)}')
    return theta, None if kind == "default" else {**scaling, "rope_type": kind}


def _context_len(raw: Mapping[str, Any]) -> int:
    """Longest sequence served. Attention here is full, so a sliding window ends it: up to there both agree."""
    longest = raw.get("max_position_embeddings", 2048)
    mistral = (raw.get("architectures") or [""])[0] == "MistralForCausalLM"
    window = raw.get("sliding_window") if raw.get("use_sliding_window", mistral) else None
    return min(longest, window) if window else longest
