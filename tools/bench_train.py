"""One optimizer step of LoRA training beside peft + transformers: tokens/s and peak memory.

    python tools/bench_train.py                        # loss on every token
    python tools/bench_train.py --prompt-len 128       # loss on the second half of each row
    python tools/bench_train.py --no-checkpointing

SmolLM2-135M, bf16 with fp32 adapters, all linears, r 8, dropout 0.05, AdamW, clipping; 4 rows of 256 tokens a step, so
that peft pads nothing. Each side has its own process; they take turns. The first losses must agree.
"""

import argparse
import random
import sys

from interleave import Round, contest, serve

ROWS, ROW_LEN = 4, 256


def rows(step: int) -> list[list[int]]:
    """Token ids from the ordinary part of the vocabulary."""
    rng = random.Random(step)
    return [[rng.randrange(1000, 20000) for _ in range(ROW_LEN)] for _ in range(ROWS)]


def isheep(args: argparse.Namespace) -> None:
    from pathlib import Path

    from isheep.cli import open_named
    from isheep.config import TrainConfig
    from isheep.model.lora import LoRAConfig, attach
    from isheep.train.data import Example
    from isheep.train.trainer import Trainer

    model = open_named(args.model, args.dtype, "cpu").model
    adapter = attach(model, LoRAConfig(dropout=args.dropout), "a")
    cfg = TrainConfig(
        batch_size=ROWS, micro_batch_tokens=ROWS * ROW_LEN, epochs=1000, warmup_steps=0,
        gradient_checkpointing=args.checkpointing,
    )  # fmt: skip
    trainer = Trainer(model, adapter, [Example(tuple(ids), args.prompt_len) for ids in rows(0)], [], cfg, 0)
    steps = iter(trainer.steps)

    def play() -> Round:
        row = trainer.step(next(steps))
        return Round(row["num_tokens"], row["loss"])

    with trainer.training():
        if args.profile:
            profile(play, Path(args.profile))
        serve(play)


def peft(args: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from isheep.model.lora import ALL_LINEAR
    from isheep.model.weights import resolve

    base = AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=getattr(torch, args.dtype))
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=args.dropout, target_modules=list(ALL_LINEAR))
    model = get_peft_model(base, config)
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0)
    ids = torch.tensor(rows(0))
    labels = ids.clone()
    labels[:, : args.prompt_len] = -100

    def play() -> Round:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return Round(ids.numel(), loss.item())

    serve(play)


def profile(play, path) -> None:  # type: ignore[no-untyped-def]
    """Where one step's time goes, operator by operator."""
    import torch

    play()
    with torch.profiler.profile() as profiler:
        play()
    path.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


SIDES = {"isheep": isheep, "peft": peft}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--dropout", type=float, default=0.05)
    p.add_argument("--prompt-len", type=int, default=0, help="tokens of each row without loss")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--profile", help="write a table of isheep's operators to this file")
    p.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.side:
        import torch

        torch.set_num_threads(args.threads)
        SIDES[args.side](args)
    else:
        commands = {side: [sys.executable, *sys.argv, "--side", side] for side in SIDES}
        contest(commands, args.rounds, tolerance=0.01)


if __name__ == "__main__":
    main()
