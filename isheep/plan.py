"""Memory and traffic of a run on a mesh of GPUs, by arithmetic, before anything is loaded.

    python -m isheep.plan --model qwen1.5-72b --gpus 8 --gpu a800-80gb

GPUs form a mesh, replicate × shard. Each rank holds its part of every sharded weight and computes on it while sampling
(tensor parallel); training gathers one layer after another (FSDP2). `choose` picks the mesh, or says what would fit.
The arithmetic is in model/sizes.py.
"""

import argparse
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from isheep.cli import run_main
from isheep.config import DTYPES, RunConfig, UserError, did_you_mean, load_run, model_preset, model_presets
from isheep.model.config import ModelConfig
from isheep.model.sizes import GIB, Memory, Sizes, parameter_shapes

# Stays free of what is planned: the CUDA context and the collectives' buffers take one or two GiB, and the allocator's
# blocks do not fit each other without gaps.
FREE_SHARE = 0.1
# GiB as CUDA reports them, which is less than on the label.
GPUS = {"h100-80gb": 79.1, "a100-80gb": 79.1, "a100-40gb": 39.4, "a800-80gb": 79.1, "h200-141gb": 139.7}


@dataclass(frozen=True)
class Plan:
    """A mesh and what it costs. `why` says where the mesh comes from."""

    sizes: Sizes
    num_devices: int
    device_bytes: int
    why: str

    @property
    def shard(self) -> int:
        return self.sizes.shard

    @property
    def replicate(self) -> int:
        return self.sizes.replicate

    @property
    def usable(self) -> int:
        return usable(self.device_bytes)

    @functools.cached_property
    def training(self) -> Memory:
        return self.sizes.training()

    @functools.cached_property
    def sampling(self) -> Memory:
        return self.sizes.sampling(self.usable)

    @property
    def kv_tokens(self) -> int:
        return self.sampling["KV cache"] // self.sizes.kv_token_bytes

    @property
    def num_sequences(self) -> int:
        """Of `sequence_tokens`, that the cache holds."""
        return self.kv_tokens // self.sizes.sequence_tokens

    @property
    def needed(self) -> int:
        """Bytes of the fuller phase, sampling with the cache that is set or, if none is, with one for one sequence."""
        sampling, s, cfg = self.sampling, self.sizes, self.sizes.cfg.sampler
        one = -(-s.sequence_tokens // cfg.block_size) * cfg.block_size * s.kv_token_bytes
        cache = sampling["KV cache"] if cfg.kv_cache_gib is not None else one
        return max(self.training.bytes, sampling.bytes - sampling["KV cache"] + cache)

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    @property
    def serves_all(self) -> bool:
        """Whether all sequences that may run at once have room, so that none waits or is preempted."""
        return self.fits and self.num_sequences >= self.sizes.cfg.sampler.max_num_seqs

    def lines(self) -> list[str]:
        """The choice and its arithmetic, for the run's log and for `python -m isheep.plan`."""
        s, n = self.sizes, self.num_devices
        head = f"{s.cfg.model} in {s.cfg.dtype} on {_gpus(n, self.device_bytes)}"
        idle = n - s.shard * s.replicate
        return [
            f"{head}: --shard {s.shard} --replicate {s.replicate}, {self.why}"
            + (f"; {idle} stay idle" if idle else ""),
            *self._memory_lines(),
            *self._traffic_lines(),
        ]

    def _memory_lines(self) -> Iterator[str]:
        for memory in (self.training, self.sampling):
            yield f"{memory.phase + ', a GPU':<19} {'GiB':>8}"
            for term in memory.terms:
                yield f"  {term.name:<17} {term.bytes / GIB:8.2f}  {term.how}"
            share = f"of {self.usable / GIB:.2f}: {1 - FREE_SHARE:.0%} of {self.device_bytes / GIB:.1f}"
            yield f"  {'sum':<17} {memory.bytes / GIB:8.2f}  {share}"
        seqs, tokens = self.sizes.cfg.sampler.max_num_seqs, self.sizes.sequence_tokens
        yield f"the cache holds {self.num_sequences:,} sequences of {tokens:,} tokens; up to {seqs} run at once"

    def _traffic_lines(self) -> Iterator[str]:
        s = self.sizes
        rows, prompt, micro = s.cfg.sampler.max_num_seqs, s.cfg.sampler.max_num_batched_tokens, s.num_micro_batches
        steps = {
            f"decode step, {rows} sequences": s.sampling_traffic(rows),
            f"prefill, {prompt:,} tokens": s.sampling_traffic(prompt),
            f"training step, {micro} micro-batch{'es' * (micro > 1)}": s.training_traffic(micro),
        }
        if not any(steps.values()):
            yield "the GPU talks to no other"
            return
        yield f"{'traffic, a GPU':<31} {'number':>6} {'MiB each':>10} {'MiB':>10} {'MiB sent':>10}"
        for name, collectives in steps.items():
            total, sent = sum(c.payload for c in collectives), sum(c.wire for c in collectives)
            count = sum(c.count for c in collectives)
            yield f"  {name:<29} {count:6,} {'':>10} {total / 2**20:10,.1f} {sent / 2**20:10,.1f}"
            for c in collectives:
                sizes = f"{c.count:6,} {c.bytes / 2**20:10,.1f} {c.payload / 2**20:10,.1f} {c.wire / 2**20:10,.1f}"
                yield f"    {c.what:<27} {sizes}  {c.kind} over {c.ranks}"


def usable(device_bytes: int) -> int:
    return int(device_bytes * (1 - FREE_SHARE))


def choose(
    config: ModelConfig,
    cfg: RunConfig,
    num_devices: int,
    device_bytes: int,
    shard: int | None = None,
    replicate: int | None = None,
) -> Plan:
    """The mesh of a run: what is given, or the smallest shard that serves all sequences which may run at once.

    Fewer shards mean less traffic; a smaller cache, fewer sequences at a time. Where no shard serves them all, the one
    with the largest cache is taken. Raises UserError with what would fit where nothing does, and where `shard` and
    `replicate` do not divide the devices. `cfg.iterations` is resolved.
    """
    _check_mesh(num_devices, shard, replicate)
    shapes = parameter_shapes(config)
    plan = _best(_candidates(config, cfg, shapes, num_devices, device_bytes, shard, replicate))
    if plan.fits:
        return plan
    ways = _ways_out(plan, given=shard is not None or replicate is not None)
    phase = "training" if plan.training.bytes == plan.needed else "sampling"
    raise UserError(
        f"{cfg.model} does not fit on {_gpus(num_devices, device_bytes)} with --shard {plan.shard}: {phase} needs "
        f"{plan.needed / GIB:.1f} GiB of each, {plan.needed / plan.usable:.2f} times the {plan.usable / GIB:.1f} GiB "
        f"it may take" + (f"; it fits {', or '.join(ways)}." if ways else ", and no setting alone would change that.")
    )


def _gpus(num_devices: int, device_bytes: int) -> str:
    return f"{num_devices} GPU{'s' * (num_devices > 1)} of {device_bytes / GIB:.1f} GiB"


def _check_mesh(num_devices: int, shard: int | None, replicate: int | None) -> None:
    for flag, value in (("--shard", shard), ("--replicate", replicate)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}.")
    if num_devices % ((shard or 1) * (replicate or 1)):
        given = [f"{flag} {value}" for flag, value in (("--shard", shard), ("--replicate", replicate)) if value]
        choices = ", ".join(map(str, _divisors(num_devices)))
        raise UserError(
            f"{' × '.join(given)} does not divide {num_devices} GPUs: --shard × --replicate must be one of {choices}."
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _candidates(
    config: ModelConfig,
    cfg: RunConfig,
    shapes: dict[str, tuple[int, ...]],
    num_devices: int,
    device_bytes: int,
    shard: int | None = None,
    replicate: int | None = None,
) -> Iterable[Plan]:
    """Every mesh that uses all devices, by rising shard; or the one that is given."""
    if shard is None and replicate is None:
        meshes = [(d, num_devices // d) for d in _divisors(num_devices)]
    elif shard is None:
        assert replicate is not None
        meshes = [(num_devices // replicate, replicate)]
    else:
        meshes = [(shard, replicate or num_devices // shard)]
    why = "as given" if shard or replicate else "the only mesh" if num_devices == 1 else ""
    for own_shard, own_replicate in meshes:
        yield Plan(Sizes(config, cfg, shapes, own_shard, own_replicate), num_devices, device_bytes, why)


def _best(plans: Iterable[Plan]) -> Plan:
    """The first that serves all sequences, else what fits with the largest cache, else the one that lacks least."""
    plans = list(plans)
    seqs, tokens = plans[0].sizes.cfg.sampler.max_num_seqs, plans[0].sizes.sequence_tokens
    for plan in plans:
        if plan.serves_all:
            why = f"the smallest shard whose training fits and whose cache holds {seqs} sequences of {tokens:,} tokens"
            return replace(plan, why=plan.why or why)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        best = max(fitting, key=lambda plan: plan.num_sequences)
        why = f"the largest cache, though none holds {seqs} sequences of {tokens:,} tokens"
        return replace(best, why=best.why or why)
    return min(plans, key=lambda plan: plan.needed)


def _ways_out(plan: Plan, given: bool) -> list[str]:
    """One change at a time that makes it fit: another mesh, more GPUs, a setting, a smaller model."""
    s, n, size = plan.sizes, plan.num_devices, plan.device_bytes
    ways = []

    def fitting(cfg: RunConfig, num_devices: int) -> Plan | None:
        """With the given mesh where only a setting changes, else with any."""
        mesh = (plan.shard, plan.replicate) if given and num_devices == n and cfg is not s.cfg else (None, None)
        best = _best(_candidates(s.config, cfg, s.shapes, num_devices, size, *mesh))
        return best if best.fits else None

    found = fitting(s.cfg, n) if given else None
    if found is not None:
        ways.append(f"with --shard {found.shard}")
    else:
        more = next(filter(None, (fitting(s.cfg, n * factor) for factor in (2, 4, 8, 16, 32))), None)
        if more is not None:
            ways.append(f"on {_gpus(more.num_devices, size)} with --shard {more.shard}")
    ways += [f"with {text}" for text, cfg in _smaller_settings(s.cfg, lambda cfg: fitting(cfg, n) is not None)]
    other = _smaller_model(plan)
    return [*ways, f"as a smaller model such as {other}"] if other else ways


def _smaller_settings(cfg: RunConfig, fits: Callable[[RunConfig], bool]) -> Iterator[tuple[str, RunConfig]]:
    """Each single setting that is enough, at the largest of its halves."""
    changes: list[tuple[str, str, list]] = [
        ("train", "gradient_checkpointing", [] if cfg.train.gradient_checkpointing else [True]),
        ("train", "micro_batch_tokens", _halves(cfg.train.micro_batch_tokens, cfg.train.cutoff)),
        ("train", "loss_chunk_tokens", _halves(cfg.train.loss_chunk_tokens, 64)),
        ("sampler", "max_num_batched_tokens", _halves(cfg.sampler.max_num_batched_tokens, 256)),
        ("sampler", "max_num_seqs", _halves(cfg.sampler.max_num_seqs, 4)),
        ("sampler", "kv_cache_gib", [] if cfg.sampler.kv_cache_gib is None else [None]),
    ]
    for section, name, values in changes:
        for value in values:
            changed = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
            if fits(changed):
                yield f"{section}.{name} = {'none' if value is None else str(value).lower()}", changed
                break


def _halves(value: int, least: int) -> list[int]:
    """Half of it, a quarter, and so on while it is at least `least`."""
    return [value // 2**k for k in range(1, value.bit_length()) if value // 2**k >= least]


def _smaller_model(plan: Plan) -> str | None:
    """The largest preset that fits where this model does not."""
    own = sum(map(math.prod, plan.sizes.shapes.values()))
    sizes = []
    for name, preset in model_presets().items():
        config = ModelConfig.from_dict(preset.architecture)
        shapes = parameter_shapes(config)
        sizes.append((sum(map(math.prod, shapes.values())), name, config, shapes))
    for count, name, config, shapes in sorted(sizes, key=lambda entry: entry[0], reverse=True):
        if count < own:
            best = _best(_candidates(config, plan.sizes.cfg, shapes, plan.num_devices, plan.device_bytes))
            if best.fits:
                return name
    return None


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m isheep.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a name from configs/models, or a folder with a config.json")
    p.add_argument("--gpus", type=int, default=1, help="how many (default 1)")
    p.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}, or the GiB of one")
    p.add_argument("--shard", type=int, help="GPUs that share one copy of the weights; default: chosen from memory")
    p.add_argument("--replicate", type=int, help="such copies; default: all GPUs are used")
    p.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default bfloat16)")
    p.add_argument("--config", action="append", type=Path, default=[], help="a run's TOML file; later ones win")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; may be given several times"
    )
    return p


def main() -> None:
    args = parser().parse_args()
    if args.gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {args.gpus}.")
    size = _device_bytes(args.gpu)
    given = {"model": args.model, "out": "runs/plan"} | ({"dtype": args.dtype} if args.dtype else {})
    cfg = load_run(*args.config, flags=given, overrides=args.set)
    preset = model_preset(cfg.model)
    if cfg.iterations is None:
        cfg = replace(cfg, iterations=preset.iterations if preset else 3)
    config = ModelConfig.from_dict(preset.architecture) if preset else _config_of(cfg.model)
    print("\n".join(choose(config, cfg, args.gpus, size, args.shard, args.replicate).lines()))


def _device_bytes(text: str) -> int:
    """'a800-80gb' or '79.1' -> bytes."""
    if text.lower() in GPUS:
        return int(GPUS[text.lower()] * GIB)
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return int(float(text) * GIB)
    raise UserError(f'--gpu "{text}" is neither a known GPU nor a number of GiB.{did_you_mean(text, GPUS)}')


def _config_of(model: str) -> ModelConfig:
    """Of a checkpoint's folder; a plan downloads nothing."""
    from isheep.model.weights import read_config

    if not (Path(model) / "config.json").is_file():
        raise UserError(
            f'"{model}" is no preset and no folder with a config.json, and a plan downloads nothing.'
            f"{did_you_mean(model, model_presets())}"
        )
    return ModelConfig.from_dict(read_config(Path(model)))


if __name__ == "__main__":
    run_main(main)
