"""Perplexities and last-layer vectors of instruction pairs: one packed forward over outputs and pairs together.

    python -m isheep.score --model smollm2-135m --data pairs.json --out scored.jsonl --vectors vectors.safetensors

`--data` is a JSON array or JSONL of {"instruction", "input", "output"}. A row of `--out` is the row of `--data` plus
output_ppl, pair_ppl, num_output_tokens and num_pair_tokens. `--vectors` gets `mean` and `last`, each [N, C] float32 in
row order. Perplexity is exp of the mean negative log-likelihood of tokens 2 to n (paper §5); no special token is added.
With `--template` the output is scored given the prompt that this template makes of instruction and input, and the pair
is that prompt and the output. The same command goes on where it was stopped.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from isheep.artifacts import Journal, read_rows, write_atomic, writes_to
from isheep.cli import Opened, add_model_args, assemble, named_folder, open_model, run_main
from isheep.config import MeasureConfig, RunConfig, UserError, load_config
from isheep.log import Progress, log
from isheep.mesh import ALONE, Mesh
from isheep.model import ops
from isheep.model.batch import PackedBatch
from isheep.model.transformer import Transformer
from isheep.text.templates import TEMPLATES, template
from isheep.text.tokenizer import Tokenizer

Prompt = Callable[[Mapping[str, Any]], str]
FIELDS = ("instruction", "input", "output")
POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class Scored:
    """What one forward says of the rows from `first` on."""

    first: int
    scores: list[dict[str, Any]]  # {output_ppl, pair_ppl, num_output_tokens, num_pair_tokens} a row
    vectors: Tensor  # [rows, len(POOLINGS), C] fp32 on the CPU; no rows where none were asked for


class Item(NamedTuple):
    """A row as token ids."""

    output: list[int]  # to be scored alone; empty where it is scored within the pair
    pair: list[int]
    num_before: int | None = None  # tokens of the pair before its output, where the output is scored given those
    num_pooled: int | None = None  # first tokens of the pair that vectors are pooled over; None: all

    @property
    def num_tokens(self) -> int:
        """What it costs in a forward."""
        return len(self.output) + len(self.pair)


def score_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    join: str = "",
    adapter: str | None = None,
    vectors: bool = False,
    batch_tokens: int = MeasureConfig.batch_tokens,
    skip: int = 0,
    mesh: Mesh = ALONE,
    prompt: Prompt | None = None,
) -> Iterator[Scored]:
    """Score every row's output alone, and its instruction, input and output joined by `join` (empty ones left out).

    With `prompt`, a row's text before its output, the output is scored given that, and the pair is both; of an output
    whose finish_reason is "length" the vectors leave out the last token, as they do where it was sampled.

    Yields batches of whole rows in order. Which rows share a forward follows from the rows and `batch_tokens` alone, so
    a run that goes on with `skip` rows done gets the bytes of one that was not stopped (in float32). A text of fewer
    than 2 tokens has no perplexity (None); one beyond the model's context is cut there and counted in the log.
    """
    limit = model.config.context_len
    whole = [_given(row, prompt(row), tokenizer) if prompt else _alone(row, join, tokenizer) for row in rows]
    num_cut = sum(len(item.pair) > limit for item in whole)
    if num_cut:
        log.warning("%d of %d rows are longer than the model's context of %d tokens: cut", num_cut, len(rows), limit)
    items = [item._replace(output=item.output[:limit], pair=item.pair[:limit]) for item in whole]
    spans = list(_batches([item.num_tokens for item in items], batch_tokens))
    todo = [(first, last) for first, last in spans if first >= skip]
    scored = _score_together(model, [items[first:last] for first, last in todo], adapter, vectors, mesh)
    yield from (Scored(first, *part) for (first, _), part in zip(todo, scored, strict=True))


def _alone(row: Mapping[str, Any], join: str, tokenizer: Tokenizer) -> Item:
    pair = join.join(filter(None, map(row.get, FIELDS)))
    return Item(tokenizer.encode(row.get("output") or ""), tokenizer.encode(pair))


def _given(row: Mapping[str, Any], prompt: str, tokenizer: Tokenizer) -> Item:
    before, output = tokenizer.encode(prompt), tokenizer.encode(row.get("output") or "")
    was_cut = row.get("finish_reason") == "length"
    return Item([], before + output, len(before), len(before) + len(output) - was_cut)


Batch = Sequence[Item]  # rows that share a forward


def _score_together(
    model: Transformer, batches: Sequence[Batch], adapter: str | None, vectors: bool, mesh: Mesh
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """`_score` of each batch in order; the ranks of a mesh take a batch each, as far as there are any."""
    mesh.command("score", adapter=adapter, vectors=vectors)
    try:
        for at in range(0, len(batches), mesh.size):
            group = mesh.share(batches[at : at + mesh.size])
            yield from mesh.collect(_score_own(model, group, adapter, vectors, mesh))[: len(group)]
    finally:
        mesh.share(None)


def follow(opened: Opened, mesh: Mesh, adapter: str | None, vectors: bool) -> None:
    """A follower's part in `_score_together`."""
    while (group := mesh.share()) is not None:
        mesh.collect(_score_own(opened.model, group, adapter, vectors, mesh))


def _score_own(
    model: Transformer, group: Sequence[Batch], adapter: str | None, vectors: bool, mesh: Mesh
) -> tuple[list[dict[str, Any]], Tensor]:
    """This rank's batch. One that has none takes a token, for the gathering of weights is everybody's."""
    with mesh.together():
        return _score(model, group[mesh.rank] if mesh.rank < len(group) else [Item([0], [])], adapter, vectors)


def _batches(num_tokens: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive rows that have at most `batch_tokens` together; a longer row stands alone."""
    first = used = 0
    for i, n in enumerate(num_tokens):
        if i > first and used + n > batch_tokens:
            yield first, i
            first, used = i, 0
        used += n
    if num_tokens:
        yield first, len(num_tokens)


@torch.no_grad()
def _score(model: Transformer, rows: Batch, adapter: str | None, vectors: bool) -> tuple[list[dict[str, Any]], Tensor]:
    """Rows -> their scores and, where asked for, pooled vectors of the pairs."""
    lens = [len(ids) for row in rows for ids in (row.output, row.pair)]
    nll, hidden = _forward(model, [ids for row in rows for ids in (row.output, row.pair) if ids], adapter)
    parts = nll.split(lens)
    scores = [_scores(row, *parts[2 * i : 2 * i + 2]) for i, row in enumerate(rows)]
    pairs = hidden.split(lens)[1::2] if vectors else ()
    pooled = [_pool(part[: row.num_pooled]) for row, part in zip(rows, pairs)]
    return scores, torch.stack(pooled).cpu() if pooled else torch.zeros(0)


def _scores(row: Item, output: Tensor, pair: Tensor) -> dict[str, Any]:
    """From the negative log-likelihoods of each token's successor: a text's last place predicts nothing."""
    output = output[:-1] if row.num_before is None else pair[max(row.num_before - 1, 0) : -1]
    num_output = len(row.output) if row.num_before is None else max(len(row.pair) - row.num_before, 0)
    return {
        "output_ppl": perplexity(_mean(output)),
        "pair_ppl": perplexity(_mean(pair[:-1])),
        "num_output_tokens": num_output,
        "num_pair_tokens": len(row.pair),
    }


def _forward(model: Transformer, sequences: Sequence[list[int]], adapter: str | None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [T] fp32 of each token's successor (0 at a sequence's end), and hidden states [T, C]."""
    if not sequences:
        return torch.zeros(0), torch.zeros(0, model.config.hidden_size)
    batch = PackedBatch.pack(sequences, model.device, adapter)
    targets = batch.input_ids.roll(-1)
    targets[batch.cu_seqlens[1:].long() - 1] = ops.IGNORE
    hidden = model(batch)
    return model.nll(hidden, targets).cpu(), hidden


def _mean(nll: Tensor) -> float | None:
    return nll.double().mean().item() if len(nll) else None


def perplexity(mean_nll: float | None) -> float | None:
    """Six digits: what two runs on other machines can agree on, and more than a filter needs."""
    if mean_nll is None:
        return None
    if not math.isfinite(mean_nll):
        raise UserError(f"a log-likelihood is {mean_nll}: the model's numbers overflow, score with --dtype float32.")
    return float(f"{math.exp(min(mean_nll, 700.0)):.6g}")


def _pool(hidden: Tensor) -> Tensor:
    """hidden [n, C] -> [len(POOLINGS), C] fp32; zeros for a text without tokens."""
    if not len(hidden):
        return torch.zeros(len(POOLINGS), hidden.shape[1], device=hidden.device)
    hidden = hidden.float()
    return torch.stack([hidden.mean(0), hidden[-1]])


def part_of(vectors: Path) -> Path:
    """Where the vectors of an unfinished file are."""
    return vectors.with_name(f"{vectors.name}.part")


class VectorFile:
    """Pooled vectors on their way to safetensors: `<path>.part` grows by [len(POOLINGS), C] float32 a row."""

    def __init__(self, path: Path, width: int, num_rows: int) -> None:
        """Go on after `num_rows` rows; what a kill left beyond them is cut off."""
        self.path, self.part, self.shape = path, part_of(path), (len(POOLINGS), width)
        known_len = num_rows * len(POOLINGS) * width * 4
        with writes_to(self.part):
            self.part.parent.mkdir(parents=True, exist_ok=True)
            with self.part.open("ab") as file:
                found = file.tell()
                file.truncate(known_len) if found >= known_len else None
        if found < known_len:
            raise UserError(
                f"{self.part} has fewer rows than were scored: delete it and the scores' .part to start again."
            )

    def append(self, vectors: Tensor) -> None:
        """vectors [n, len(POOLINGS), C] fp32. Call it before the rows themselves are recorded as done."""
        assert vectors.shape[1:] == self.shape and vectors.dtype == torch.float32
        with writes_to(self.part), self.part.open("ab") as file:
            file.write(vectors.numpy().tobytes())

    def save(self, order: Sequence[int] | None = None) -> None:
        """All rows as one safetensors file; remove `part_of` it once nothing needs them a second time.

        `order`: where each row of the file is among those that were appended; None: as they are.
        """
        stored = torch.from_numpy(np.fromfile(self.part, dtype=np.float32)).reshape(-1, *self.shape)
        stored = stored if order is None else stored[list(order)]
        write_atomic(self.path, save({name: stored[:, i].contiguous() for i, name in enumerate(POOLINGS)}))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m isheep.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_args(p)
    p.add_argument("--data", type=Path, required=True, help="JSON array or JSONL of instruction, input, output")
    p.add_argument("--out", type=Path, required=True, help="JSONL: each row with its scores")
    p.add_argument("--vectors", type=Path, help="safetensors file for the pairs' pooled last-layer vectors")
    p.add_argument("--join", default="", help="between instruction, input and output of a pair; default: nothing")
    p.add_argument("--template", help=f"score outputs given their prompts: {', '.join(TEMPLATES)}")
    return p


def main() -> None:
    args = parser().parse_args()
    if len(args.adapter) > 1:
        raise UserError(f"--adapter is given {len(args.adapter)} times: rows are scored through one adapter at most.")
    overrides = [text if text.startswith("measure.") else f"measure.{text}" for text in args.set]
    cfg = load_config(RunConfig, {"model": args.model, "out": str(args.out)}, overrides=overrides).measure
    rows, num_bad = read_rows(args.data)
    usable = [row for row in rows if all(isinstance(row.get(name) or "", str) for name in FIELDS)]
    num_bad += len(rows) - len(usable)
    log.info("%d rows to score, %d skipped: no object, or a field that is no text", len(usable), num_bad)
    settings = {"model": args.model, "dtype": args.dtype, "join": args.join, "vectors": args.vectors is not None}
    settings["batch_tokens"] = cfg.batch_tokens
    if args.template:
        settings["template"] = template(args.template).name
    inputs = {"data": args.data}
    if args.adapter:
        inputs["adapter"] = named_folder(args.adapter[0])[1] / "adapter_model.safetensors"
    mesh = assemble(args.shard, args.replicate, args.device, args.rank_timeout)
    with Journal(args.out, settings, inputs) as journal:
        if journal.sealed:
            log.info("%s is complete already", args.out)
        else:
            _score_file(usable, journal, cfg.batch_tokens, args, mesh)
    if args.vectors:
        part_of(args.vectors).unlink(missing_ok=True)


def _score_file(
    rows: list[dict[str, Any]], journal: Journal, batch_tokens: int, args: argparse.Namespace, mesh: Mesh
) -> None:
    opened = open_model(args, mesh)
    adapter = next(iter(opened.adapters), None)
    num_done = sum(len(done) for done in journal.done.values())
    vectors = VectorFile(args.vectors, opened.model.config.hidden_size, num_done) if args.vectors else None
    options = {"join": args.join, "adapter": adapter, "vectors": vectors is not None, "batch_tokens": batch_tokens}
    if args.template:
        asked = template(args.template)
        options["prompt"] = lambda row: asked.prompt(row.get("instruction") or "", row.get("input") or "")
    with Progress("scoring", len(rows)) as bar:
        bar.update(num_done)
        for batch in score_rows(opened.model, opened.tokenizer, rows, skip=num_done, mesh=mesh, **options):
            if vectors is not None:
                vectors.append(batch.vectors)
            scored = [{**rows[batch.first + i], **scores} for i, scores in enumerate(batch.scores)]
            journal.append(str(batch.first), scored)
            bar.update(len(scored))
    if vectors is not None:
        vectors.save()
    journal.seal(sorted(journal.done, key=int))


if __name__ == "__main__":
    run_main(main, lambda: {"score": follow})
