"""What every command shares: the flags that choose a model, opening it, and how a command ends.

A command module has `parser() -> ArgumentParser`, `main() -> int | None`, and ends in
`if __name__ == "__main__": run_main(main)`. torch is imported when a model is opened, so that --help and a mistyped
flag answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from isheep import log
from isheep.artifacts import os_error_sentence
from isheep.config import DTYPES, ModelPreset, UserError, model_preset

if TYPE_CHECKING:
    import torch

    from isheep.model.transformer import Transformer
    from isheep.text.templates import Template
    from isheep.text.tokenizer import Tokenizer

OUT_OF_MEMORY = (
    "the memory is not enough: lower sampler.max_num_seqs, sampler.kv_cache_gib or train.micro_batch_tokens with "
    "--set, or take a smaller model."
)


@dataclass(frozen=True)
class Opened:
    """A model ready for use. `adapters` are the names under which its LoRA adapters are attached, in order."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    template: "Template"
    preset: ModelPreset | None
    name: str
    adapters: tuple[str, ...] = ()


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter, --dtype, --device, --seed and --set, the same in every command."""
    parser.add_argument("--model", required=True, help="a name from configs/models, a hub id, or a local folder")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="a LoRA adapter in PEFT's format; may be given several times; its name is the folder where none is given",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be given several times"
    )


def open_model(args: argparse.Namespace, template: str | None = None) -> Opened:
    """Load what `add_model_args`'s flags choose; `template` overrules the model's own."""
    return open_named(args.model, args.dtype, args.device, args.adapter, template)


def open_named(
    model: str, dtype: str, device: str, adapters: Sequence[str] = (), template: str | None = None
) -> Opened:
    """Weights, tokenizer and chat template of `model`, with each "[NAME=]FOLDER" of `adapters` attached."""
    import torch

    from isheep.model.lora import load_adapter
    from isheep.model.weights import load_model, resolve
    from isheep.text.tokenizer import load_tokenizer

    named = [named_folder(text) for text in adapters]
    names = tuple(name for name, _ in named)
    if len(set(names)) < len(names):
        raise UserError(f"two adapters are named alike in {', '.join(names)}: give each its own with NAME=FOLDER.")
    where = pick_device(device)
    preset = model_preset(model)
    tokenizer = load_tokenizer(resolve(model))
    chosen = _template(template, preset, tokenizer)
    weights = load_model(model, getattr(torch, dtype), where)
    for name, folder in named:
        load_adapter(weights, folder, name)
    return Opened(weights, tokenizer, chosen, preset, model, names)


def pick_device(name: str) -> "torch.device":
    """'auto' is the first CUDA device, or the CPU where there is none."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'device "{name}" is not known: use auto, cpu, cuda or cuda:N.') from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'device "{name}" is not here, {torch.cuda.device_count()} CUDA devices are: use --device cpu.')
    return device


def named_folder(text: str) -> tuple[str, Path]:
    """'NAME=FOLDER' or 'FOLDER' -> (name, folder). A folder whose path holds "=" is taken as it is."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).exists():
        name = folder = text
    if not Path(folder).is_dir():
        raise UserError(f"the adapter {folder} is not a folder: give one with adapter_config.json in it.")
    return name, Path(folder)


def _template(name: str | None, preset: ModelPreset | None, tokenizer: "Tokenizer") -> "Template":
    """The template asked for, else the preset's, else the one whose control tokens the tokenizer knows."""
    from isheep.text.templates import template

    if name is None and preset is not None:
        name = preset.template
    if name is None:
        marks = {"<|im_end|>": "chatml", "<|eot_id|>": "llama3"}
        name = next((marks[mark] for mark in marks if tokenizer.token_id(mark) is not None), "raw")
        log.log.info('this model has no preset: template "%s", from the tokenizer\'s control tokens', name)
    return template(name)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process: 0 or main's own code; 2 for a user's mistake; 130 for Ctrl-C.

    A user's mistake, a full disk and too little memory end in one sentence on stderr; a bug in its traceback.
    """
    log.setup()
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """What to tell the user of an error that is no bug; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return os_error_sentence(error)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return OUT_OF_MEMORY
    return None


def _is_torch_out_of_memory(error: Exception) -> bool:
    """torch says it in a RuntimeError: "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"."""
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
