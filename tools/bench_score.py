"""Perplexities and pooled vectors beside transformers: tokens/s.

    python tools/bench_score.py

16 rows of instruction, input and output; each row's output alone and all of it as one text go through SmolLM2-135M in
bf16. transformers is run three ways, and the best counts: the backbone once on sequences padded together by length
(batches of 8) with head and cross-entropy in chunks of 512 tokens; batches of 4 with all logits; one at a time. Each
side has its own process; they take turns.
"""

import argparse
import random
import sys

from interleave import Round, contest, serve

NUM_ROWS = 16


def rows() -> list[tuple[list[int], list[int]]]:
    """(output ids, pair ids): lengths as of generated pairs, 16–256 tokens of output, 24–120 before it."""
    rng = random.Random(0)
    made = []
    for _ in range(NUM_ROWS):
        pair = [rng.randrange(1000, 20000) for _ in range(rng.randint(24, 120) + rng.randint(16, 256))]
        made.append((pair[-rng.randint(16, len(pair) - 8) :], pair))
    return made


def isheep(args: argparse.Namespace) -> None:
    from isheep import score
    from isheep.cli import open_named

    model, work = open_named(args.model, args.dtype, "cpu").model, rows()
    lens = [len(a) + len(b) for a, b in work]

    def play() -> Round:
        done = [score._score(model, work[a:b], None, True) for a, b in score._batches(lens, args.batch_tokens)]
        ppl = [row["pair_ppl"] for scores, _ in done for row in scores]
        return Round(sum(lens), sum(ppl) / len(ppl))

    if args.profile:
        import torch

        play()
        with torch.profiler.profile() as profiler:
            play()
        with open(args.profile, "w") as file:
            file.write(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
    serve(play)


def transformers(args: argparse.Namespace) -> None:
    """All sequences in order of length, `size` at a time, padded on the right."""
    import torch
    from transformers import AutoModelForCausalLM

    from isheep.model.weights import resolve

    model = AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=getattr(torch, args.dtype)).eval()
    sequences = [ids for row in rows() for ids in row]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    size, chunked = {"chunks": (args.size, True), "batches": (4, False), "one by one": (1, False)}[args.way]

    def nll(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[N] for hidden [N, C]; the head in chunks of 512 tokens, or at once."""
        parts = zip(hidden.split(512), targets.split(512)) if chunked else [(hidden, targets)]
        losses = [torch.nn.functional.cross_entropy(model.lm_head(h).float(), t, reduction="none") for h, t in parts]
        return torch.cat(losses)

    @torch.inference_mode()
    def play() -> Round:
        ppl: dict[int, float] = {}
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            lens = [len(sequences[i]) for i in chosen]
            width = max(lens)
            ids = torch.tensor([sequences[i] + [0] * (width - len(sequences[i])) for i in chosen])
            mask = torch.arange(width) < torch.tensor(lens)[:, None]
            hidden = model.model(ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            counted = mask[:, 1:]  # padded places meet no head
            losses = nll(hidden[:, :-1][counted], ids[:, 1:][counted])
            pooled = (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            last = hidden[torch.arange(len(lens)), torch.tensor(lens) - 1].float()
            assert pooled.shape == last.shape
            ppl.update(zip(chosen, (part.mean().exp().item() for part in losses.split([n - 1 for n in lens]))))
        pairs = [ppl[i] for i in range(1, len(sequences), 2)]
        return Round(sum(map(len, sequences)), sum(pairs) / len(pairs))

    serve(play)


WAYS = {
    "transformers, chunks": "chunks",
    "transformers, batches of 4": "batches",
    "transformers, one by one": "one by one",
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batch-tokens", type=int, default=4096)
    p.add_argument("--size", type=int, default=8, help="sequences padded together in transformers' chunked way")
    p.add_argument("--profile", help="write a table of isheep's operators to this file")
    p.add_argument("--way", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.way:
        import torch

        torch.set_num_threads(args.threads)
        isheep(args) if args.way == "isheep" else transformers(args)
    else:
        ways = {"isheep": "isheep", **WAYS}
        commands = {name: [sys.executable, *sys.argv, "--way", way] for name, way in ways.items()}
        contest(commands, args.rounds, tolerance=0.03)


if __name__ == "__main__":
    main()
