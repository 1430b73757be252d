"""LoRA fine-tuning on any file in Alpaca's format.

    python -m isheep.train --model smollm2-135m --data dataset.json --out runs/tuned --set epochs=3

A row of `--data` (JSON array or JSONL) is {"instruction", "input", "output"}. `--out` gets adapter/ in PEFT's format,
train_log.jsonl with one row a step, and train_summary.json. The same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

from isheep.artifacts import read_rows
from isheep.cli import Opened, Parts, add_model_args, assemble, open_model, run_main
from isheep.config import RunConfig, TrainConfig, UserError, load_config
from isheep.log import log


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m isheep.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_args(p)
    p.add_argument("--data", type=Path, required=True, help="JSON array or JSONL of instruction, input, output")
    p.add_argument("--out", type=Path, required=True, help="folder for the adapter, the log and the summary")
    p.add_argument("--template", help="default: the model's own")
    p.add_argument("--config", type=Path, help="a run's TOML file, whose [train] section is taken")
    return p


def main() -> None:
    args = parser().parse_args()
    cfg = _settings(args)
    if len(args.adapter) > 1:
        raise UserError(f"--adapter is given {len(args.adapter)} times: training goes on from one adapter at most.")
    rows, num_bad = read_rows(args.data)
    mesh = assemble(args.shard, args.replicate, args.device, args.rank_timeout, args.out)
    opened = open_model(args, mesh, args.template)
    _train(opened, rows, num_bad, cfg, args)


def _settings(args: argparse.Namespace) -> TrainConfig:
    """The [train] section of --config under --set; "train." may be left out there."""
    given = {"model": args.model, "out": str(args.out)}
    overrides = [text if text.startswith("train.") else f"train.{text}" for text in args.set]
    sources = [given, args.config, given] if args.config else [given]
    return load_config(RunConfig, *sources, overrides=overrides).train


def _train(opened: Opened, rows: list[dict], num_bad: int, cfg: TrainConfig, args: argparse.Namespace) -> None:
    from isheep.model.lora import LoRAConfig, attach
    from isheep.train.data import prepare
    from isheep.train.trainer import train

    train_examples, val_examples, num_dropped = prepare(rows, opened.template, opened.tokenizer, cfg, args.seed)
    log.info(
        *("%d rows to train on, %d to validate, %d skipped", len(train_examples), len(val_examples)),
        num_bad + num_dropped,
    )
    if opened.adapters:
        adapter = opened.model.adapters[opened.adapters[0]]
        log.info("training goes on from %s: its own r, alpha, dropout and targets hold", args.adapter[0])
    else:
        config = LoRAConfig(cfg.r, cfg.alpha, cfg.dropout, cfg.target_modules)
        adapter = attach(opened.model, config, "trained", args.seed)
    examples = train_examples, val_examples
    summary = train(opened.model, adapter, *examples, cfg, args.out, args.seed, opened.name, opened.mesh)
    best = f", best validation loss {summary.best_val_loss:.4f}" if summary.best_val_loss is not None else ""
    log.info(
        "%s holds the adapter: %d steps, last loss %.4f%s, %.0f tok/s, peak memory %.2f GiB",
        *(args.out / "adapter", summary.num_steps, summary.final_loss, best, summary.tok_per_s, summary.peak_gib),
    )


def parts() -> Parts:
    from isheep.train import trainer

    return {"train": trainer.follow}


if __name__ == "__main__":
    run_main(main, parts)
