"""What the model's inside says of each pair: perplexities and last-layer vectors (paper §5)."""

from pathlib import Path

from isheep.artifacts import Journal
from isheep.config import MeasureConfig
from isheep.log import Progress
from isheep.mesh import ALONE, Mesh
from isheep.model.transformer import Transformer
from isheep.score import VectorFile, part_of, score_rows
from isheep.stages import Iteration, Row, kept, read_sealed
from isheep.text.tokenizer import Tokenizer

JOIN = ""  # between instruction, input and output of a pair: as the paper ran it


def measure(it: Iteration, model: Transformer, tokenizer: Tokenizer, cfg: MeasureConfig, mesh: Mesh = ALONE) -> None:
    """Perplexities and pooled vectors of the pairs that passed the rules, by the model that wrote them.

    reads   answers.jsonl
    writes  measures.jsonl       {id, output_ppl, pair_ppl, num_output_tokens, num_pair_tokens}
            vectors.safetensors  mean and last, each [N, C] float32
            both in the order of the answers
    """
    file = it.file("answers.jsonl")
    what = {"join": JOIN, "batch_tokens": cfg.batch_tokens}
    vectors = it.file("vectors.safetensors")
    with it.journal("measures.jsonl", what, {"answers": file}, [vectors.name]) as journal:
        if not journal.sealed:
            _measure(it, model, tokenizer, cfg, mesh, kept(read_sealed(file)), vectors, journal)
    part_of(vectors).unlink(missing_ok=True)


def _measure(
    it: Iteration,
    model: Transformer,
    tokenizer: Tokenizer,
    cfg: MeasureConfig,
    mesh: Mesh,
    rows: list[Row],
    path: Path,
    journal: Journal,
) -> None:
    """Measure the rows that are not done, and seal both files."""
    num_done = sum(len(done) for done in journal.done.values())
    vectors = VectorFile(path, model.config.hidden_size, num_done)
    with Progress(f"{it.name} measure", len(rows)) as bar:
        bar.update(num_done)
        for batch in score_rows(model, tokenizer, rows, JOIN, it.adapter, True, cfg.batch_tokens, num_done, mesh):
            vectors.append(batch.vectors)
            ids = [row["id"] for row in rows[batch.first :]]
            scored = [{"id": row_id, **scores} for row_id, scores in zip(ids, batch.scores)]
            journal.append(str(batch.first), scored)
            bar.update(len(scored))
    vectors.save()
    journal.seal(sorted(journal.done, key=int))
