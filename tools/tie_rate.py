"""How often bf16 rounding decides a greedy token: the same prompts in batches of other sizes.

    python tools/tie_rate.py

Every prompt is continued greedily, alone, eight together and all together; where two texts part, the two best tokens
were so near each other that the order of a sum decided. In float32 the texts must be the same.
"""

import argparse
from itertools import combinations

from isheep.cli import open_named
from isheep.config import SamplerConfig, data_path
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request, SamplingParams
from isheep.text.seeds import load_seeds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--num-prompts", type=int, default=20)
    p.add_argument("--max-tokens", type=int, default=64)
    args = p.parse_args()
    opened = open_named(args.model, args.dtype, "auto")
    tasks, _ = load_seeds(data_path("seeds", "seed_tasks.jsonl"))
    prompts = [opened.template.prompt(task.instruction, task.input) for task in tasks[: args.num_prompts]]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    requests = [Request(str(i), tuple(opened.tokenizer.encode(text)), params) for i, text in enumerate(prompts)]
    runs = {}
    for size in (1, 8, len(requests)):
        cfg = SamplerConfig(max_num_seqs=size, prefix_caching=False, kv_cache_gib=1.0)
        sampler = Sampler(opened.model, opened.tokenizer, cfg)
        runs[size] = [completion.token_ids for completion in sampler.generate(requests)]
        sampler.close()
    print(f"{opened.name}, {args.dtype}: {len(requests)} greedy texts of {args.max_tokens} tokens")
    for a, b in combinations(runs, 2):
        # up to where two texts part, every token was drawn from the same context
        parted = [next((i for i, (x, y) in enumerate(zip(s, t)) if x != y), None) for s, t in zip(runs[a], runs[b])]
        apart = [i for i in parted if i is not None]
        compared = sum(args.max_tokens if i is None else i + 1 for i in parted)
        print(f"{a} beside {b} at once: {len(apart)} texts part, {len(apart) / compared:.2%} of {compared} tokens")


if __name__ == "__main__":
    main()
