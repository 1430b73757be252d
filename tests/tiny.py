"""Small random models for tests: one shape of each architecture, and the twin in transformers."""

import json
from pathlib import Path
from typing import Any

import torch

from isheep.model.config import ModelConfig
from isheep.model.transformer import Transformer
from tests.tiny_tokenizer import write_tiny_tokenizer

BASE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> config.json: every architecture; MHA and GQA; tied and untied; head_dim given and derived; rope scaling
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_mha": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 6},
    "qwen2_gqa_tied": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "llama_gqa": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama_31_rope": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "llama_linear_rope_bias": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3_head_dim": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 16,
        "sliding_window": None,
    },
}


def config_json(name: str, **changes: Any) -> dict[str, Any]:
    return {**BASE, **CONFIGS[name], **changes}


def tiny_model(
    name: str = "llama_gqa", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Transformer:
    """A random model; weights large enough that attention and logits are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(ModelConfig.from_dict(config_json(name, **changes)))
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.1 * noise if "norm" in key else 0.15 * noise).to(dtype)
    return model


def write_checkpoint(model: Transformer, folder: Path, name: str = "llama_gqa", **changes: Any) -> Path:
    """The model as a checkpoint folder with the tiny tokenizer, loadable by transformers too."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: p.detach().contiguous() for k, p in model.named_parameters() if ".lora." not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(name, **changes)))
    write_tiny_tokenizer(folder)
    return folder


def transformers_twin(model: Transformer, folder: Path, name: str = "llama_gqa", **changes: Any) -> torch.nn.Module:
    """transformers' own model on the same weights, fp32, eager attention off."""
    from transformers import AutoModelForCausalLM

    write_checkpoint(model, folder, name, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
