"""What the model's inside says of each pair: perplexities and last-layer vectors (paper §5)."""

import torch
from safetensors import safe_open

from isheep.artifacts import Journal
from isheep.config import MeasureConfig
from isheep.log import Progress
from isheep.mesh import ALONE, Mesh
from isheep.model.transformer import Transformer
from isheep.score import POOLINGS, VectorFile, part_of, score_rows
from isheep.stages import KEPT, Iteration, Row, kept, read_sealed
from isheep.stages.caught import MEASURES
from isheep.text.tokenizer import Tokenizer

JOIN = ""  # between instruction, input and output of a pair: as the paper ran it
CAUGHT = "caught"  # the key of the rows that were, in the journal; those that are scored have their batch's first row


def measure(it: Iteration, model: Transformer, tokenizer: Tokenizer, cfg: MeasureConfig, mesh: Mesh = ALONE) -> None:
    """Perplexities and pooled vectors of the pairs that passed the rules, by the model that wrote them.

    reads   answers.jsonl, caught.safetensors where measures are caught
    writes  measures.jsonl       {id, output_ppl, pair_ppl, num_output_tokens, num_pair_tokens}
            vectors.safetensors  mean and last, each [N, C] float32
            both in the order of the answers, those that were caught before those that had to be scored
    """
    inputs, vectors = {"answers": it.file("answers.jsonl")}, it.file("vectors.safetensors")
    what: Row = {"join": JOIN, "batch_tokens": cfg.batch_tokens}
    if cfg.catches:
        what = {"context": cfg.context, "batch_tokens": cfg.batch_tokens}
        inputs["caught"] = it.file("caught.safetensors")
    with it.journal("measures.jsonl", what, inputs, [vectors.name]) as journal:
        if not journal.sealed:
            answers = read_sealed(inputs["answers"])
            rows = kept(answers)
            store = VectorFile(vectors, model.config.hidden_size, sum(len(done) for done in journal.done.values()))
            if cfg.catches:
                _take_caught(it, [row for row in answers if row["caught"]], store, journal)
            _score(it, model, tokenizer, cfg, mesh, [row for row in rows if not row.get("caught")], store, journal)
            store.save()
            journal.seal(sorted(journal.done, key=lambda key: -1 if key == CAUGHT else int(key)))
    part_of(vectors).unlink(missing_ok=True)


def _take_caught(it: Iteration, rows: list[Row], store: VectorFile, journal: Journal) -> None:
    """What generation has shown, of the rows that passed the rules."""
    places = [i for i, row in enumerate(rows) if row["verdict"] == KEPT]
    if not places or CAUGHT in journal.done:
        return
    with safe_open(it.file("caught.safetensors"), "pt") as file:
        store.append(torch.stack([file.get_tensor(name)[places] for name in POOLINGS], dim=1))
    taken = [rows[i] for i in places]
    journal.append(CAUGHT, [{"id": row["id"]} | {name: row["caught"][name] for name in MEASURES} for row in taken])


def _score(
    it: Iteration,
    model: Transformer,
    tokenizer: Tokenizer,
    cfg: MeasureConfig,
    mesh: Mesh,
    rows: list[Row],
    store: VectorFile,
    journal: Journal,
) -> None:
    """Score the rows that are not done."""
    num_done = sum(len(done) for key, done in journal.done.items() if key != CAUGHT)
    prompt = (lambda row: it.asking.prompt(row["instruction"], row["input"])) if cfg.catches else None
    with Progress(f"{it.name} measure", len(rows)) as bar:
        bar.update(num_done)
        for batch in score_rows(
            model, tokenizer, rows, JOIN, it.adapter, True, cfg.batch_tokens, num_done, mesh, prompt
        ):
            store.append(batch.vectors)
            ids = [row["id"] for row in rows[batch.first :]]
            scored = [{"id": row_id, **scores} for row_id, scores in zip(ids, batch.scores)]
            journal.append(str(batch.first), scored)
            bar.update(len(scored))
