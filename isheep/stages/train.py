"""Fine-tuning on what was selected (paper §6). The model of the next iteration is the base with this adapter."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from isheep.config import TrainConfig
from isheep.mesh import ALONE, Mesh
from isheep.model.lora import Adapter, LoRAConfig, attach, attach_onto
from isheep.model.transformer import Transformer
from isheep.stages import Iteration
from isheep.text.templates import Template
from isheep.text.tokenizer import Tokenizer
from isheep.train import trainer
from isheep.train.data import prepare

# What is trained: puts the adapter of an iteration on the model, as training finds it.
Start = Callable[[Transformer, Iteration, TrainConfig], Adapter]


def fresh_on_base(model: Transformer, it: Iteration, cfg: TrainConfig) -> Adapter:
    """A new adapter that changes nothing yet: the base model is trained, whatever was trained before."""
    config = LoRAConfig(cfg.r, cfg.alpha, cfg.dropout, cfg.target_modules)
    return attach(model, config, it.name, it.seed + it.number)


def stacked_on_last(model: Transformer, it: Iteration, cfg: TrainConfig) -> Adapter:
    """The last iteration's adapter with fresh ranks on top: what was trained goes on, and its ranks stay."""
    if it.adapter is None:
        return fresh_on_base(model, it, cfg)
    config = LoRAConfig(cfg.r, cfg.alpha, cfg.dropout, cfg.target_modules)
    return attach_onto(model, it.adapter, config, it.name, it.seed + it.number)


def train(
    it: Iteration, model: Transformer, tokenizer: Tokenizer, template: Template, start: Start,
    datasets: Sequence[Path], cfg: TrainConfig, mesh: Mesh = ALONE,
) -> None:  # fmt: skip
    """Train the adapter that `start` makes on the rows of all `datasets`; it stays on the model under `it.name`.

    reads   dataset.json of one or more iterations
    writes  adapter/ (PEFT's format), train_log.jsonl (one row a step), train_summary.json (the seal, with times)
    """
    rows = [row for path in datasets for row in json.loads(path.read_bytes())]
    examples, val_examples, _ = prepare(rows, template, tokenizer, cfg, it.seed)
    adapter = start(model, it, cfg)
    trainer.train(model, adapter, examples, val_examples, cfg, it.folder, it.seed, it.model, mesh, it.others)
