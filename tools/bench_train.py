"""One optimizer step of LoRA training beside peft + transformers: tokens/s and peak memory.

    python tools/bench_train.py                        # loss on every token
    python tools/bench_train.py --prompt-len 128       # loss on the second half of each row
    python tools/bench_train.py --no-checkpointing
    python tools/bench_train.py --random llama-3-8b --device cuda --rows 16 --min-len 100 --row-len 2000 --tuned
    python tools/bench_train.py --random qwen1.5-72b --layers 8 --device cuda --rows 16 --row-len 1024 --tuned

SmolLM2-135M, bf16 with fp32 adapters, all linears, r 8, dropout 0.05, AdamW, clipping; 4 rows of 256 tokens a step, so
that peft pads nothing. With --random the model has the shape of a preset and random weights; --layers cuts it to its
first layers, a true slice of a model that is too large. --tuned adds peft as an expert would run it: rows packed into
one without padding, cuDNN's attention wherever it can serve, torch.compile. Each side has its own process; they take
turns. Their losses before the first step must agree.
"""

import argparse
import random
import sys
import zlib
from contextlib import nullcontext
from typing import Any

from interleave import Round, contest, serve


def rows(args: argparse.Namespace) -> list[list[int]]:
    """Token ids from the ordinary part of the vocabulary."""
    rng = random.Random(0)
    lens = [rng.randint(args.min_len or args.row_len, args.row_len) for _ in range(args.rows)]
    return [[rng.randrange(1000, 20000) for _ in range(n)] for n in lens]


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the preset --random, cut to --layers."""
    from isheep.config import model_preset

    preset = model_preset(args.random)
    if preset is None:
        raise SystemExit(f"--random {args.random}: there is no such file in configs/models")
    return preset.architecture | ({"num_hidden_layers": args.layers} if args.layers else {})


def fill(model: Any) -> None:
    """Random weights that follow from each parameter's name, so that all sides have the same.

    Products keep their inputs' size, and logits spread so far that another model would have another loss.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, float("norm" in name))
        else:
            spread = 3.0 if "embed" in name or "lm_head" in name else 1.0
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.data.normal_(0, spread / parameter.shape[1] ** 0.5, generator=generator)


def isheep_model(args: argparse.Namespace) -> Any:
    import torch

    from isheep.cli import open_named
    from isheep.model.config import ModelConfig
    from isheep.model.transformer import Transformer

    if not args.random:
        return open_named(args.model, args.dtype, args.device).model
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(architecture(args))).to(getattr(torch, args.dtype))
    model.to_empty(device=args.device)
    fill(model)
    return model


def peft_model(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from isheep.model.weights import resolve

    dtype = getattr(torch, args.dtype)
    if not args.random:
        return AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=dtype).to(args.device)
    shape = architecture(args)
    kind = shape["architectures"][0].removesuffix("ForCausalLM").lower()
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=dtype)
    fill(model)
    return model


def isheep(args: argparse.Namespace) -> None:
    from pathlib import Path

    from isheep.config import TrainConfig
    from isheep.model.lora import LoRAConfig, attach
    from isheep.train.data import Example
    from isheep.train.trainer import Trainer

    model = isheep_model(args)
    adapter = attach(model, LoRAConfig(dropout=args.dropout), "a")
    examples = [Example(tuple(ids), args.prompt_len) for ids in rows(args)]
    cfg = TrainConfig(
        batch_size=args.rows, micro_batch_tokens=args.micro_batch_tokens or args.rows * args.row_len, epochs=1000,
        warmup_steps=0, cutoff=args.row_len, gradient_checkpointing=args.checkpointing,
    )  # fmt: skip
    trainer = Trainer(model, adapter, examples, [], cfg, 0)
    steps = iter(trainer.steps)

    losses = []

    def play() -> Round:
        row = trainer.step(next(steps))
        losses.append(row["loss"])
        return Round(row["num_tokens"], losses[0])

    with trainer.training():
        if args.profile:
            profile(play, Path(args.profile))
        serve(play, args.device)


def peft(args: argparse.Namespace, tuned: bool = False) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from isheep.model.lora import ALL_LINEAR

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=args.dropout, target_modules=list(ALL_LINEAR))
    model = get_peft_model(peft_model(args), config)
    if args.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0)
    batch = packed(rows(args), args.prompt_len) if tuned else padded(rows(args), args.prompt_len)
    num_tokens = sum(map(len, rows(args)))
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    forward = torch.compile(model) if tuned else model
    autocast = torch.autocast(
        args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32"
    )  # as Trainer does
    best_first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    forced = tuned and args.device == "cuda"
    attention = sdpa_kernel(best_first, set_priority=True) if forced else nullcontext()

    losses = []

    def play() -> Round:
        with autocast:
            loss = forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        return Round(num_tokens, losses[0])

    with attention:
        serve(play, args.device)


def padded(rows: list[list[int]], prompt_len: int) -> dict[str, Any]:
    """As transformers' own collators make it."""
    import torch

    lens = torch.tensor([len(ids) for ids in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < lens[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :prompt_len] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def packed(rows: list[list[int]], prompt_len: int) -> dict[str, Any]:
    """All rows as one, told apart by their positions; a row's first token is nobody's label."""
    import torch

    labels = [[-100] * min(len(ids), max(1, prompt_len)) + ids[max(1, prompt_len) :] for ids in rows]
    return {
        "input_ids": torch.cat([torch.tensor(ids) for ids in rows])[None],
        "labels": torch.cat([torch.tensor(ids) for ids in labels])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in rows])[None],
    }


def peft_tuned(args: argparse.Namespace) -> None:
    peft(args, tuned=True)


def profile(play, path) -> None:  # type: ignore[no-untyped-def]
    """Where one step's time goes, operator by operator."""
    import torch

    play()
    with torch.profiler.profile() as profiler:
        play()
    path.write_text(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))


SIDES = {"isheep": isheep, "peft": peft, "peft_tuned": peft_tuned}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--random", help="a preset of configs/models, with random weights, instead of --model")
    p.add_argument("--layers", type=int, help="of --random; default: all that the preset has")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--dropout", type=float, default=0.05)
    p.add_argument("--rows", type=int, default=4, help="of a step")
    p.add_argument("--row-len", type=int, default=256, help="tokens of the longest row")
    p.add_argument("--min-len", type=int, help="tokens of the shortest row; default: all are alike")
    p.add_argument("--prompt-len", type=int, default=0, help="tokens of each row without loss")
    p.add_argument("--micro-batch-tokens", type=int, help="of one forward of isheep's; default: a step is one")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--tuned", action="store_true", help="a third side: peft as an expert would run it")
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
        sides = [side for side in SIDES if side != "peft_tuned" or args.tuned]
        contest({side: [sys.executable, *sys.argv, "--side", side] for side in sides}, args.rounds, tolerance=0.002)


if __name__ == "__main__":
    main()
