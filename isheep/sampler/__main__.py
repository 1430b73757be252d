"""Offline batched generation.

    python -m isheep.sampler --model smollm2-135m --prompts in.jsonl --out out.jsonl --temperature 0.7 --max-tokens 200

A row of `--prompts` is {"id", "prompt"} (raw text), {"id", "messages": [{role, content}]} or Alpaca's {"instruction",
"input"} (both through the template), and may carry its own n, temperature, top_p, top_k, min_p, max_tokens, stop, seed,
adapter and so on. Completions are appended to `--out` as they finish; the same command goes on where it was stopped.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isheep.artifacts import canonical_json, read_rows, write_atomic, writes_to
from isheep.cli import Opened, Parts, add_model_args, assemble, open_model, run_main
from isheep.config import SamplerConfig, UserError, did_you_mean, diff, load_config
from isheep.log import Progress, log
from isheep.sampler.request import Request, SamplingParams

PARAMS = {field.name: field for field in dataclasses.fields(SamplingParams)}
LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "logprob_token_ids")
SWITCHES = {"ignore_eos": "go on to max_tokens", "pool": "return mean and last hidden state too"}
COUNTS = ("n", "top_k", "max_tokens", "min_tokens", "logprobs", "num_prompt_logprobs")
BASE = "base"  # as a row's adapter: none of the loaded ones


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m isheep.sampler", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_args(p)
    p.add_argument("--prompts", type=Path, required=True, help="JSONL or a JSON array")
    p.add_argument("--out", type=Path, required=True, help="JSONL, one completion a line, appended to")
    p.add_argument("--template", help="for messages and instructions; default: the model's own")
    for name, field in PARAMS.items():
        flag = "--" + name.replace("_", "-")
        default = f"default {field.default!r}"
        if name in SWITCHES:
            p.add_argument(flag, action="store_true", help=SWITCHES[name])
        elif name == "stop":
            p.add_argument(flag, action="append", default=[], help="a text that ends a completion; may be repeated")
        elif name in LISTS:
            p.add_argument(flag, type=int, nargs="+", default=field.default, help="token ids")
        elif name in COUNTS:
            p.add_argument(flag, type=int, default=field.default, help=default)
        elif name != "seed":  # --seed is the run's
            p.add_argument(flag, type=float, default=field.default, help=default)
    return p


def main() -> None:
    args = parser().parse_args()
    cfg = load_config(SamplerConfig, overrides=[text.removeprefix("sampler.") for text in args.set])
    defaults = {name: getattr(args, name) for name in PARAMS if name != "seed"}
    to_params(defaults)  # a bad flag is told before anything is read
    rows, num_bad = read_rows(args.prompts)
    mesh = assemble(args.shard, args.replicate, args.device, args.rank_timeout)
    done = _resume(
        args.out,
        {
            "model": args.model,
            "adapter": args.adapter,
            "dtype": args.dtype,
            "seed": args.seed,
            "template": args.template,
            **defaults,
        },
    )
    opened = open_model(args, mesh, args.template)
    requests: list[Request] = []
    for i, row in enumerate(rows):
        try:
            requests.append(to_request(row, str(i), defaults, opened))
        except UserError as error:
            num_bad += 1
            log.warning("row %d of %s is skipped: %s", i + 1, args.prompts, error)
    repeated = [id for id, count in Counter(request.id for request in requests).items() if count > 1]
    if repeated:
        raise UserError(
            f'{args.prompts} has {len(repeated)} ids twice, "{repeated[0]}" among them: give each row its own.'
        )
    todo = [request for request in requests if request.id not in done]
    log.info("%d requests, %d of them done before, %d bad rows", len(requests), len(requests) - len(todo), num_bad)
    if todo:
        _generate(todo, opened, cfg, args)


def to_params(values: Mapping[str, Any]) -> SamplingParams:
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SamplingParams(**plain)


def to_request(row: Mapping[str, Any], default_id: str, defaults: Mapping[str, Any], opened: Opened) -> Request:
    """A row of the input as a request; UserError where it cannot be one."""
    own = {name: row[name] for name in PARAMS if row.get(name) is not None}
    adapter = row.get("adapter") or next(iter(opened.adapters), None)
    adapter = None if adapter == BASE else adapter
    if adapter is not None and adapter not in opened.adapters:
        raise UserError(f'adapter "{adapter}" is not loaded.{did_you_mean(str(adapter), [*opened.adapters, BASE])}')
    prompt = opened.tokenizer.encode(_prompt(row, opened))
    limit = opened.model.config.context_len
    if len(prompt) >= limit:
        raise UserError(f"its prompt has {len(prompt)} tokens and the model's context ends at {limit}.")
    return Request(str(row.get("id", default_id)), tuple(prompt), to_params({**defaults, **own}), adapter)


def _prompt(row: Mapping[str, Any], opened: Opened) -> str:
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    if isinstance(row.get("messages"), list):
        return opened.template.chat(row["messages"])
    if isinstance(row.get("instruction"), str):
        return opened.template.prompt(row["instruction"], row.get("input") or "")
    raise UserError('it has neither "prompt" nor "messages" nor "instruction" as text.')


def _resume(out: Path, settings: Mapping[str, Any]) -> set[str]:
    """Ids that `out` holds completely. Cuts a torn last line and the samples of unfinished requests.

    `settings` are kept beside, in `<out>.settings.json`: other ones for the same file are a UserError.
    """
    beside = out.with_name(out.name + ".settings.json")
    if not out.exists():
        write_atomic(beside, json.dumps(settings, indent=1) + "\n")
        return set()
    before = json.loads(beside.read_text()) if beside.exists() else {}
    changed = diff(before, json.loads(json.dumps(settings)))
    if changed:
        raise UserError(f"{out} was made with another {', '.join(changed)}: give another --out, or delete it.")
    rows = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1] if line.strip()]
    counts = Counter(row["id"] for row in rows)
    whole = {row["id"] for row in rows if counts[row["id"]] == row["num_samples"]}
    write_atomic(out, "".join(canonical_json(row) + "\n" for row in rows if row["id"] in whole))
    return whole


def _generate(requests: list[Request], opened: Opened, cfg: SamplerConfig, args: argparse.Namespace) -> None:
    from isheep.sampler.team import start_sampler

    stops = opened.template.stop_token_ids(opened.tokenizer)
    sampler = start_sampler(opened.model, opened.tokenizer, cfg, args.seed, stops, opened.mesh)
    total = {request.id: request.params.n for request in requests}
    started = time.perf_counter()
    bar = Progress("sampling", sum(total.values()), "completions")
    with bar, writes_to(args.out), args.out.open("a", encoding="utf-8") as file:
        for completion in sampler.stream(requests):
            file.write(canonical_json({**completion.to_json(), "num_samples": total[completion.id]}) + "\n")
            file.flush()
            time_s = time.perf_counter() - started
            bar.update(
                prefill=f"{sampler.stats.num_prefill_tokens / time_s:.0f} tok/s",
                decode=f"{sampler.stats.num_decode_tokens / time_s:.0f} tok/s",
            )
    stats = sampler.stats
    log.info(
        "%d prompt tokens computed, %d found in the cache, %d tokens sampled in %.1f s (%.0f tok/s)",
        stats.num_prefill_tokens,
        stats.num_cached_tokens,
        stats.num_decode_tokens,
        stats.time_s,
        stats.num_decode_tokens / max(stats.time_s, 1e-9),
    )
    sampler.close()


def parts() -> Parts:
    from isheep.sampler import team

    return {"sample": team.follow}


if __name__ == "__main__":
    run_main(main, parts)
