"""The sampler beside its rivals, on one workload in one run.

    python tools/bench_sampler.py                                    # isheep and transformers
    python tools/bench_sampler.py --vllm-python ~/v/bin/python  # and vLLM, in its own environment
    python tools/bench_sampler.py --prefix                           # a shared prefix, with and without its cache

64 requests, prompts of 100–400 tokens, outputs of 16–256 (forced, greedy), SmolLM2-135M, bf16, no prefix cache on any
side. Each contender has its own process and warms up first; rounds are interleaved; medians and spreads are printed.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

Workload = list[tuple[list[int], int]]  # prompt ids, number of output tokens
NUM_REQUESTS, PREFIX_LEN, PREFIX_OUTPUT = 64, 300, 16
SEED = 3942  # of the lengths: 15,484 prompt and 7,616 output tokens


def workload(seed: int = SEED) -> Workload:
    """Token ids drawn from the ordinary part of the vocabulary: speed does not depend on which."""
    rng = random.Random(seed)
    lens = [(rng.randint(100, 400), rng.randint(16, 256)) for _ in range(NUM_REQUESTS)]
    return [([rng.randrange(1000, 20000) for _ in range(p)], o) for p, o in lens]


def prefix_workload(seed: int = SEED) -> Workload:
    rng = random.Random(seed)
    shared = [rng.randrange(1000, 20000) for _ in range(PREFIX_LEN)]
    tail = lambda: [rng.randrange(1000, 20000) for _ in range(rng.randint(20, 40))]  # noqa: E731
    return [(shared + tail(), PREFIX_OUTPUT) for _ in range(NUM_REQUESTS)]


def run_isheep(model: str, work: Workload, dtype: str, prefix_caching: bool = False) -> float:
    from isheep.cli import open_named
    from isheep.config import SamplerConfig
    from isheep.sampler.engine import Sampler
    from isheep.sampler.request import Request, SamplingParams

    opened = open_named(model, dtype, "cpu")
    sampler = Sampler(opened.model, opened.tokenizer, SamplerConfig(prefix_caching=prefix_caching))

    def requests(name: str, rows: Workload) -> list[Request]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in rows]
        return [Request(f"{name}{i}", tuple(ids), p) for i, ((ids, _), p) in enumerate(zip(rows, params))]

    warm = [([7] * 50, 8), ([9] * 80, 8)]
    sampler.generate(requests("warm", warm))
    started = time.perf_counter()
    done = sampler.generate(requests("r", work))
    seconds = time.perf_counter() - started
    assert sum(len(c.token_ids) for c in done) == sum(n for _, n in work)
    print(sampler.stats, file=sys.stderr)
    return seconds


def run_transformers(model: str, work: Workload, dtype: str) -> float:
    """`generate` on left-padded batches of 32 in order of arrival, each as long as its longest output."""
    import torch
    from transformers import AutoModelForCausalLM

    from isheep.model.weights import resolve

    llm = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=getattr(torch, dtype)).eval()

    def generate(rows: Workload) -> None:
        width, longest = max(len(ids) for ids, _ in rows), max(n for _, n in rows)
        ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in rows])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
        with torch.inference_mode():
            llm.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=longest,
                max_new_tokens=longest,
                pad_token_id=0,
            )

    generate([([7] * 50, 8), ([9] * 80, 8)])
    started = time.perf_counter()
    for i in range(0, len(work), 32):
        generate(work[i : i + 32])
    return time.perf_counter() - started


def run_vllm(model: str, work: Workload, dtype: str) -> float:
    """vLLM's CPU build; `model` is the converted checkpoint's folder, since its environment has no isheep."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype=dtype, enable_prefix_caching=False, max_num_seqs=64, max_model_len=2048)

    def generate(rows: Workload) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in rows]
        llm.generate([{"prompt_token_ids": ids} for ids, _ in rows], params, use_tqdm=False)

    generate([([7] * 50, 8), ([9] * 80, 8)])
    started = time.perf_counter()
    generate(work)
    return time.perf_counter() - started


WORKERS = {
    "isheep": lambda a: run_isheep(a.model, workload(), a.dtype),
    "transformers": lambda a: run_transformers(a.model, workload(), a.dtype),
    "vllm": lambda a: run_vllm(a.model, workload(), a.dtype),
    "prefix off": lambda a: run_isheep(a.model, prefix_workload(), a.dtype, prefix_caching=False),
    "prefix on": lambda a: run_isheep(a.model, prefix_workload(), a.dtype, prefix_caching=True),
}


def measure(contender: str, args: argparse.Namespace) -> float:
    """Seconds that one contender takes, in a process of its own."""
    python, model, env = sys.executable, args.model, dict(os.environ)
    if contender == "vllm":
        from isheep.model.weights import resolve

        python, model = args.vllm_python, str(resolve(args.model))
        env |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, "--worker", contender, "--model", model, "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-2000:]}")
    result = next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"'))  # vLLM logs there too
    return json.loads(result)["seconds"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--vllm-python", type=Path, help="python of an environment with vllm-cpu")
    p.add_argument("--prefix", action="store_true", help="the shared-prefix workload")
    p.add_argument("--only", nargs="+", choices=list(WORKERS), help="these contenders alone")
    p.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print(json.dumps({"seconds": WORKERS[args.worker](args)}))
        return
    contenders = ["isheep", "transformers"] + (["vllm"] if args.vllm_python else [])
    contenders = ["prefix on", "prefix off"] if args.prefix else args.only or contenders
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name in contenders:
            seconds[name].append(measure(name, args))
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    work = prefix_workload() if args.prefix else workload()
    outputs = sum(n for _, n in work)
    print(f"{sum(len(ids) for ids, _ in work)} prompt and {outputs} output tokens, {args.dtype}, {args.rounds} rounds")
    print("| contender | s (min–max) | output tok/s | times as long as the first |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [t / first for t, first in zip(times, seconds[contenders[0]])]
        middle = statistics.median(times)
        print(
            f"| {name} | {middle:.1f} ({min(times):.1f}–{max(times):.1f}) | {outputs / middle:.0f} "
            f"| {statistics.median(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
