"""The driver: the whole loop on one model, from seed tasks to trained adapters.

    python -m isheep.run --model smollm2-135m --config configs/demo.toml --out runs/demo

Settings come from each --config, then the flags, then --set; what is left are the paper's. The run folder gets
config.toml and env.json before the first token. Stopped at any moment, the same command goes on where it was.

    python -m isheep.run --recipe threshold --model qwen1.5-72b --dry-run

runs a table or figure of the paper, a grid of runs that share what they have in common; --dry-run says what it would.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isheep import ranks
from isheep.artifacts import write_atomic
from isheep.cli import Opened, Parts, add_model_args, assemble, open_named, pick_device, run_main
from isheep.config import (
    RunConfig,
    UserError,
    data_path,
    diff,
    load_config,
    load_run,
    model_preset,
    settings,
    to_toml,
)
from isheep.log import log
from isheep.text.seeds import load_seeds
from isheep.text.templates import template
from isheep.text.topics import NUM_TOPICS, TYPES

if TYPE_CHECKING:
    from isheep.recipes import Recipe
    from isheep.sampler.store import Store
    from isheep.session import Session

DEFAULT_ITERATIONS = 3  # the paper's, for all but its two largest models
# A finished result does not depend on these, so a run may go on with others. More iterations prolong a run.
MAY_CHANGE = (
    "out",
    "iterations",
    "patience",
    "alarm",
    "device",
    "sampler",
    "train.checkpoint_steps",
    "train.gradient_checkpointing",
)
PACKAGES = ("isheep", "torch", "triton", "numpy", "safetensors", "tokenizers")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m isheep.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_args(p)
    p.set_defaults(dtype=None, device=None, seed=None)  # a configuration may set them too
    p.add_argument("--config", action="append", type=Path, default=[], help="a TOML file; later ones win")
    p.add_argument("--out", help="the run folder, continued where it stands; default runs/MODEL")
    p.add_argument("--baseline", help="a method to compare with, such as self_instruct, instead of the paper's own")
    p.add_argument("--setting", help="what each iteration trains, on which data (default one_base)")
    p.add_argument("--iterations", type=int, help="default: the paper's number for this model")
    p.add_argument("--recipe", help="a grid of runs: a name from configs/recipes, or a TOML file")
    p.add_argument("--scale", type=float, help="a recipe's sizes are multiplied by this: 0.01 for a small try")
    p.add_argument("--dry-run", action="store_true", help="print a recipe's runs, what they share and what they cost")
    p.add_argument("--seeds", help="JSONL of seed tasks; default: the project's own 175")
    return p


def main() -> int | None:
    args = parser().parse_args()
    if args.adapter:
        raise UserError("a run starts from the base model: --adapter has no place here, leave it out.")
    if args.recipe is not None:
        return run_recipe(args)
    if args.scale is not None or args.dry_run:
        raise UserError("--scale and --dry-run are for a grid of runs: name one with --recipe.")
    cfg = against_folder(resolve(args))
    opened = open_for(cfg, args, Path(cfg.out))
    _iterate(start(cfg, opened))
    return None


def open_for(cfg: RunConfig, args: argparse.Namespace, out: Path) -> Opened:
    """The run's model, on all of its ranks; a mistake in the seeds does not wait for it."""
    load_seeds(seed_file(cfg))
    mesh = assemble(*mesh_shape(cfg, args), cfg.device, args.rank_timeout, out)
    return open_named(cfg.model, cfg.dtype, cfg.device, template=cfg.template, mesh=mesh)


def seed_file(cfg: RunConfig) -> Path:
    return Path(cfg.seeds) if cfg.seeds else data_path("seeds", "seed_tasks.jsonl")


def start(cfg: RunConfig, opened: Opened, others: Sequence[Path] = (), store: "Store | None" = None) -> "Session":
    """The run, with its settings and its plan written down; `others` and `store`: see `Session`."""
    from isheep.session import Session
    from isheep.text.expected import score_tokens
    from isheep.text.prompts import LEAD_IN

    cfg = replace(cfg, template=opened.template.name)
    if cfg.scores and cfg.assess.score_decoding == "expected":
        score_tokens(opened.tokenizer, LEAD_IN)  # whether it can be done is told before hours of sampling
    env = environment(opened)
    write_atomic(Path(cfg.out) / "config.toml", to_toml(cfg))
    write_atomic(Path(cfg.out) / "env.json", json.dumps(env, indent=1) + "\n")
    for line in plan(cfg, opened, seed_file(cfg), env):
        log.info(line)
    session = Session(cfg, opened, seed_file(cfg), others, store)
    session.events.write("run started", **env)
    return session


def _iterate(session: "Session") -> None:
    from isheep.iterate import iterate

    iterate(session)
    session.events.write("run finished")


def run_recipe(args: argparse.Namespace) -> int:
    """Run the cells of a recipe -> 0, or 2 where every one of them failed."""
    from isheep.recipes import get, grid_lines, load_recipe

    recipe = load_recipe(args.recipe)
    default = {"out": f"runs/{recipe.name}/{Path(args.model).name}"}
    cells = {name: resolve(args, default | recipe.base, texts) for name, texts in recipe.overrides().items()}
    root = Path(next(iter(cells.values())).out)
    cells = {name: _cell(cfg, root / name, args.scale) for name, cfg in cells.items()}
    for key in ("model", "dtype", "device", "template"):
        if len(values := {str(get(cfg, key)) for cfg in cells.values()}) > 1:
            raise UserError(f"the cells of a recipe share one model: {key} cannot be {' and '.join(sorted(values))}.")
    if not ranks.launched_here():  # else the process that started the ranks has said it
        print("\n".join(grid_lines(recipe, cells, args.scale)))
    if args.dry_run:
        return 0
    cells = {name: against_folder(cfg) for name, cfg in cells.items()}
    longest = max(cells.values(), key=lambda cfg: cfg.iterations or 0)
    return _run_grid(recipe, cells, root, open_for(longest, args, root))


def _cell(cfg: RunConfig, out: Path, scale: float | None) -> RunConfig:
    from isheep.recipes import scaled

    return replace(scaled(cfg, scale) if scale is not None else cfg, out=str(out))


def _run_grid(recipe: "Recipe", cells: Mapping[str, RunConfig], root: Path, opened: Opened) -> int:
    """All cells on the opened model; results.json and results.md in `root` say what came of them."""
    from isheep.grid import FINISHED, report, run_cells
    from isheep.sampler.store import Store

    one = next(iter(cells.values()))
    folders = [Path(cfg.out) for cfg in cells.values()]
    store = Store(root / "completions.jsonl", one.model, one.dtype, opened.template.name)
    try:
        outcomes = run_cells(
            cells,
            lambda cfg: start(cfg, opened, [folder for folder in folders if folder != Path(cfg.out)], store),
            _iterate,
            root / "results.json",
        )
    finally:
        store.close()
    text = report(recipe, one.model, outcomes)
    write_atomic(root / "results.md", text)
    print(text)
    return 0 if any(outcome["status"] == FINISHED for outcome in outcomes.values()) else 2


def mesh_shape(cfg: RunConfig, args: argparse.Namespace) -> tuple[int | None, int | None]:
    """(shard, replicate): what is given or, on GPUs, what their memory asks for, with the arithmetic in the log.

    Raises UserError where the run cannot fit, with what would.
    """
    import torch

    from isheep.model.config import ModelConfig
    from isheep.model.weights import read_config
    from isheep.model.weights import resolve as folder_of
    from isheep.plan import choose

    if pick_device(cfg.device).type != "cuda":
        return args.shard, args.replicate
    preset = model_preset(cfg.model)
    config = ModelConfig.from_dict(preset.architecture if preset else read_config(folder_of(cfg.model)))
    alone = re.fullmatch(r"cuda:\d+", cfg.device) is not None
    num_gpus = ranks.world_size() if ranks.world_size() > 1 else 1 if alone else torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory
    chosen = choose(config, cfg, num_gpus, memory, args.shard, args.replicate)
    if not ranks.launched_here():  # else the process that started the ranks has said it
        for line in chosen.lines():
            log.info(line)
    return chosen.shard, chosen.replicate


def resolve(args: argparse.Namespace, default: Mapping[str, Any] | None = None, cell: Sequence[str] = ()) -> RunConfig:
    """The run's settings, the number of iterations included; the template may still be the model's to say.

    `default` is what a configuration may change, `cell` are a recipe's "key=value" texts, which nothing may.
    """
    names = ("model", "out", "dtype", "device", "seed", "baseline", "setting", "iterations", "seeds")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    default = {"out": f"runs/{Path(args.model).name}"} | dict(default or {})
    cfg = load_run(default, *args.config, flags=flags, overrides=args.set, cell=cell)
    if cfg.baseline == "dromedary_iter1" and not cfg.scores:
        raise UserError('baseline = "dromedary_iter1" rates its answers; without that it is "self_instruct".')
    if cfg.setting == "one_last" and cfg.train.weight_decay > 0:
        raise UserError('setting = "one_last" keeps what was trained before: train.weight_decay must be 0.')
    if cfg.patience is not None and cfg.train.val_share == 0:
        raise UserError(f"patience = {cfg.patience} needs validation losses: set train.val_share above 0.")
    select = cfg.select
    if select.method != "threshold" and not cfg.measure.enabled:
        needed = "vectors" if select.clusters else "perplexities"
        raise UserError(f'select.method = "{select.method}" needs {needed}: set measure.enabled = true.')
    size, topics = cfg.instruct.data_size, cfg.instruct.method == "topics" and len(TYPES) * NUM_TOPICS
    if select.clusters and select.num_clusters > (min(size, topics) if topics else size):
        few = f'instruct.method = "topics", with {topics} at most,' if topics else f"instruct.data_size = {size}"
        raise UserError(f"{few} cannot fill select.num_clusters = {select.num_clusters}: lower the latter.")
    if cfg.paper_joins and cfg.template is not None and template(cfg.template).joint != "\n":
        raise UserError(
            f'paper_joins is about a line break between instruction and input, which template = "{cfg.template}" does '
            "not have: leave one of the two out."
        )
    if cfg.iterations is None:
        preset = model_preset(cfg.model)
        cfg = replace(cfg, iterations=preset.iterations if preset else DEFAULT_ITERATIONS)
    return cfg


def against_folder(cfg: RunConfig) -> RunConfig:
    """`cfg`, made sure that a run already in its folder has the same settings; UserError naming those that differ."""
    file = Path(cfg.out) / "config.toml"
    if not file.exists():
        return cfg
    there = load_config(RunConfig, file)
    if cfg.template is None:
        cfg = replace(cfg, template=there.template)
    changed = [key for key in diff(settings(there), settings(cfg)) if not key.startswith(MAY_CHANGE)]
    if changed:
        raise UserError(
            f"{cfg.out} holds a run with other settings, {'; '.join(_change(key, there, cfg) for key in changed)}: "
            f"give another --out, or the settings in {file}."
        )
    return cfg


def _change(key: str, there: RunConfig, now: RunConfig) -> str:
    """'select.threshold = 8.0 there, 6.0 now'"""
    values: list[Any] = []
    for cfg in (there, now):
        value: Any = cfg
        for name in key.split("."):
            value = getattr(value, name)
        values.append(value)
    return f"{key} = {values[0]} there, {values[1]} now"


def environment(opened: Opened) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its settings."""
    import torch

    from isheep.model import ops

    model = opened.model
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(__file__).parents[1]),
        "platform": platform.platform(),
        "device": str(model.device),
        "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "backend": ops.backend(model.head.weight),
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The checkout's commit, with "+" where files differ from it; None for an installed package."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changed else head


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def plan(cfg: RunConfig, opened: Opened, seeds: Path, env: dict[str, Any]) -> list[str]:
    """The run in a few lines, before it starts."""
    return [
        f"{cfg.model}: {env['num_parameters'] / 1e6:,.0f} M parameters in {cfg.dtype} on {env['device_name']}"
        f" ({env['device']}, {env['num_threads']} threads, {env['backend']})",
        f"{cfg.baseline or cfg.setting}, {cfg.iterations} iterations of {cfg.instruct.data_size:,} instructions "
        f"from {seeds.name}; kept: {_kept(cfg)}",
        f"trained: LoRA r {cfg.train.r}, {cfg.train.epochs:g} epochs, learning rate {cfg.train.learning_rate:g}, "
        f"template {opened.template.name}",
        f"results in {cfg.out}; stopped at any moment, the same command goes on",
    ]


def _kept(cfg: RunConfig) -> str:
    """Which pairs the run keeps, in words."""
    select = cfg.select
    if cfg.scores:
        level = "both scores" if len(cfg.scores) > 1 else f"{cfg.scores[0]} scores"
        return f"{level} above {select.threshold:g}, rated by the {cfg.assess.assessor} model ({cfg.assess.prompt})"
    if select.method == "threshold":
        return "every answer, whatever the rules say" if select.pardons else "every pair that passes the rules"
    if select.clusters:
        which = "a random pair" if select.method == "density" else "the pair with the lowest pair_ppl"
        return f"{which} of each of {select.num_clusters:,} clusters ({cfg.measure.pooling} vectors)"
    return f"both perplexities below {select.max_ppl:g}"


def parts() -> Parts:
    from isheep import score
    from isheep.sampler import team
    from isheep.train import trainer

    return {"sample": team.follow, "score": score.follow, "train": trainer.follow}


if __name__ == "__main__":
    run_main(main, parts)
