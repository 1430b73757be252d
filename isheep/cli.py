"""What every command shares: the flags that choose a model, opening it, and how a command ends.

A command module has `parser() -> ArgumentParser`, `main() -> int | None`, and ends in
`if __name__ == "__main__": run_main(main)`. torch is imported when a model is opened, so that --help and a mistyped
flag answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from isheep import log, ranks
from isheep.artifacts import os_error_sentence
from isheep.config import DTYPES, ModelPreset, UserError, model_preset

if TYPE_CHECKING:
    import torch

    from isheep.mesh import Mesh
    from isheep.model.transformer import Transformer
    from isheep.text.templates import Template
    from isheep.text.tokenizer import Tokenizer

OUT_OF_MEMORY = (
    "the memory is not enough: lower sampler.max_num_seqs, sampler.kv_cache_gib or train.micro_batch_tokens with "
    "--set, or take a smaller model."
)

_mesh: "Mesh | None" = None  # that this process has joined; it is in one at most


@dataclass(frozen=True)
class Opened:
    """A model ready for use. `adapters` are the names under which its LoRA adapters are attached, in order."""

    model: "Transformer"
    tokenizer: "Tokenizer"
    template: "Template"
    preset: ModelPreset | None
    name: str
    mesh: "Mesh"
    adapters: tuple[str, ...] = ()


# Name -> a follower's part in what its leader starts: called with what is open, the mesh, and the call's arguments.
Parts = Mapping[str, Callable[..., None]]


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
    parser.add_argument("--shard", type=int, help="ranks that hold one copy of the weights (see the README on GPUs)")
    parser.add_argument("--replicate", type=int, help="copies of the weights, each on ranks of its own")
    _add_rank_args(parser)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be given several times"
    )


def _add_rank_args(parser: argparse.ArgumentParser) -> None:
    """What every rank needs to know before its leader has read the other flags."""
    seconds = "a rank that is silent, or awaited, for so long ends the run (default %(default)g)"
    parser.add_argument("--rank-timeout", type=float, default=ranks.TIMEOUT_S, metavar="SECONDS", help=seconds)


def open_model(args: argparse.Namespace, mesh: "Mesh", template: str | None = None) -> Opened:
    """Load what `add_model_args`'s flags choose, on the ranks of `mesh`; `template` overrules the model's own."""
    return open_named(args.model, args.dtype, args.device, args.adapter, template, mesh)


def open_named(
    model: str,
    dtype: str,
    device: str,
    adapters: Sequence[str] = (),
    template: str | None = None,
    mesh: "Mesh | None" = None,
) -> Opened:
    """Weights, tokenizer and chat template of `model`, with each "[NAME=]FOLDER" of `adapters` attached.

    On a mesh the followers open the same, and get the adapters from the leader, who read them.
    """
    from isheep.mesh import ALONE
    from isheep.model.lora import load_adapter
    from isheep.model.parallel import share_adapter

    named = [named_folder(text) for text in adapters]
    names = tuple(name for name, _ in named)
    if len(set(names)) < len(names):
        raise UserError(f"two adapters are named alike in {', '.join(names)}: give each its own with NAME=FOLDER.")
    mesh = mesh or ALONE
    mesh.command("open", name=model, dtype=dtype, device=device, template=template)
    opened = _open(model, dtype, device, template, mesh)
    mesh.enter("after loading")  # the watch is strict from here on; a run names its stages itself
    for name, folder in named:
        share_adapter(load_adapter(opened.model, folder, name), mesh)
    return replace(opened, adapters=names)


def _open(name: str, dtype: str, device: str, template: str | None, mesh: "Mesh") -> Opened:
    import torch

    from isheep.model.weights import load_model, resolve
    from isheep.text.tokenizer import load_tokenizer

    where = pick_device(device)
    if mesh.size > 1 and where.type == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())  # the rank's own
    if where.index is not None:
        torch.cuda.set_device(where)  # where Triton launches, whatever device its tensors are on
    preset = model_preset(name)
    tokenizer = load_tokenizer(resolve(name))
    chosen = _template(template, preset, tokenizer)
    weights = load_model(name, getattr(torch, dtype), where, mesh)
    mesh.barrier()  # until all are here, the watch is as patient as loading needs
    return Opened(weights, tokenizer, chosen, preset, name, mesh)


def assemble(
    shard: int | None, replicate: int | None, device: str, timeout_s: float, out: Path | None = None
) -> "Mesh":
    """The mesh of replicate × shard ranks; both open: the ranks that torchrun started, in one replica.

    Where the ranks are not there yet, this process starts them with its own command line, waits, and ends as they do:
    call it when the flags are checked, before a file is written. `out` is the run folder, whose events say where a rank
    died. UserError where the numbers do not agree.
    """
    global _mesh
    for flag, value in (("--shard", shard), ("--replicate", replicate)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}.")
    if timeout_s <= 0:
        raise UserError(f"--rank-timeout must be above 0 seconds, not {timeout_s:g}.")
    world = ranks.world_size()
    shard = shard or max(1, world // (replicate or 1))
    replicate = replicate or max(1, world // shard)
    size, where = shard * replicate, pick_device(device).type
    if world > 1 and size != world:
        raise UserError(f"--shard {shard} and --replicate {replicate} are {size} ranks, but {world} were started.")
    if world > 1:
        from isheep.mesh import Mesh

        _mesh = Mesh.join(timeout_s, (shard, replicate, where))
    elif size > 1:
        _check_devices(size, where)
        flags = ["--shard", str(shard), "--replicate", str(replicate)]
        sys.exit(ranks.launch(size, [*sys.argv[1:], *flags], out, timeout_s, _module()))
    from isheep.mesh import ALONE

    return _mesh or ALONE


def _check_devices(size: int, device: str) -> None:
    import torch

    if device == "cuda" and torch.cuda.device_count() < size:
        raise UserError(
            f"--shard and --replicate ask for {size} GPUs, {torch.cuda.device_count()} are here: lower one of them, or "
            "start the ranks of several machines with torchrun."
        )


def _module() -> str:
    """The module that `python -m` was given."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "several ranks need a command that was started with python -m"
    return spec.name.removesuffix(".__main__")


def pick_device(name: str) -> "torch.device":
    """'auto' is the first CUDA device, or the CPU where there is none.

    UserError where there is no such device, or ISHEEP_KERNELS is no choice.
    """
    import torch

    from isheep_kernels.choice import asked_for

    try:
        asked_for("")
    except ValueError as error:
        raise UserError(str(error)) from error
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


def run_main(main: Callable[[], int | None], parts: Callable[[], Parts] = dict) -> NoReturn:
    """Run a command and end the process: 0 or main's own code; 2 for a user's mistake; 130 for Ctrl-C.

    On a mesh the leader runs `main` and the others what it tells them, `parts()` among it. A user's mistake, a full
    disk and too little memory end in one sentence on stderr; a bug in its traceback.
    """
    log.setup(quiet=ranks.is_follower())
    try:
        sys.exit((_follow(parts()) if ranks.is_follower() else _lead(main)) or 0)
    except KeyboardInterrupt as error:
        _fail_with_the_others(error, None)
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _sentence(error)
        _fail_with_the_others(error, sentence)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _fail_with_the_others(error: BaseException, sentence: str | None) -> None:
    """One of several ranks does not return from here."""
    if ranks.world_size() > 1:
        ranks.fail(error, sentence, OUT_OF_MEMORY)


def _lead(main: Callable[[], int | None]) -> int | None:
    """Run the command, then let the followers go, where there are any."""
    code = main()
    if _mesh is not None:
        _mesh.command("end")
        ranks.shutdown()
    return code


def _follow(parts: Parts) -> int:
    """Be one of the followers, until the leader says the end."""
    from isheep.mesh import Mesh

    global _mesh
    parser = argparse.ArgumentParser(add_help=False)
    _add_rank_args(parser)
    _mesh = Mesh.join(parser.parse_known_args()[0].rank_timeout)
    obey(_mesh, parts)
    ranks.shutdown()
    return 0


def obey(mesh: "Mesh", parts: Parts) -> None:
    """A follower's loop: its part in whatever the leader commands."""
    parts = {"adapter": _take_adapter, "withdraw": _withdraw_adapter, **parts}
    opened: Opened | None = None
    while (call := mesh.share())[0] != "end":
        name, payload = call
        if name == "open":
            opened = _open(**payload, mesh=mesh)
        else:
            parts[name](opened, mesh, **payload)


def _take_adapter(opened: Opened, mesh: "Mesh", **adapter: Any) -> None:
    from isheep.model.parallel import take_adapter

    take_adapter(opened.model, **adapter)


def _withdraw_adapter(opened: Opened, mesh: "Mesh", name: str) -> None:
    from isheep.model.lora import detach

    detach(opened.model, name)


def _sentence(error: Exception) -> str | None:
    """What to tell the user of an error that is no bug; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return os_error_sentence(error)
    if ranks.is_out_of_memory(error):
        return OUT_OF_MEMORY
    return None
