"""Rows to steps: the loss mask, the cutoff, the split, packing and order."""

import random
from pathlib import Path

import pytest
import torch

from isheep.config import TrainConfig, UserError
from isheep.mesh import ALONE, Mesh
from isheep.model.ops import IGNORE
from isheep.text.templates import template
from isheep.text.tokenizer import Tokenizer, load_tokenizer
from isheep.train import data
from isheep.train.data import Example
from tests.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder)


def row(instruction: str = "Name a colour.", output: str = "Blue.", **more: str) -> dict[str, str]:
    return {"instruction": instruction, "output": output, **more}


def test_the_loss_counts_the_response_and_its_end_token(tokenizer: Tokenizer) -> None:
    (example,), _, _ = data.prepare([row(input="One.")], template("chatml"), tokenizer, TrainConfig(), 0)
    batch, targets = data.pack([example, example], torch.device("cpu"), "a")
    counted = [t for t in targets.tolist() if t != IGNORE]
    response = [*tokenizer.encode("Blue."), tokenizer.eos_token_id]
    assert counted == response * 2
    assert len(response) == example.num_loss_tokens
    places = [i for i, t in enumerate(targets.tolist()) if t != IGNORE]
    assert [batch.input_ids[i + 1].item() for i in places] == counted  # each place is the one before its target
    assert batch.seqlens == (len(example.input_ids),) * 2


def test_a_row_without_prompt_counts_from_its_second_token() -> None:
    _, targets = data.pack([Example((5, 6, 7), 0)], torch.device("cpu"), "a")
    assert targets.tolist() == [6, 7, IGNORE]
    assert Example((5, 6, 7), 0).num_loss_tokens == 2


def test_tokens_are_named_by_row_and_position() -> None:
    rows = [Example((7,) * n, 1) for n in (3, 1, 2)]
    assert data.token_names([0, 5, 9], rows, torch.device("cpu")).tolist() == [0, 1, 2, 5 << 32, 9 << 32, (9 << 32) + 1]


def test_the_cutoff_holds_and_bad_rows_are_counted(tokenizer: Tokenizer) -> None:
    rows = [row(output="word " * 400), row(output=" "), row(instruction=""), row(output=3), row()]  # type: ignore[arg-type]
    cfg = TrainConfig(cutoff=64, val_share=0)
    examples, val, num_dropped = data.prepare(rows, template("chatml"), tokenizer, cfg, 0)
    assert len(examples[0].input_ids) == 64
    assert (len(examples), len(val), num_dropped) == (2, 0, 3)


def test_only_the_first_rows_are_read(tokenizer: Tokenizer) -> None:
    rows = [row(output=str(i)) for i in range(9)]
    cfg = TrainConfig(max_samples=4, val_share=0)
    examples, _, _ = data.prepare(rows, template("raw"), tokenizer, cfg, 0)
    assert [tokenizer.decode(list(e.input_ids[e.num_prompt_tokens :])) for e in examples] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("rows", [[], [row(output="")]])
def test_nothing_to_train_on_is_one_sentence(rows: list[dict[str, str]], tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="can be trained on"):
        data.prepare(rows, template("raw"), tokenizer, TrainConfig(), 0)


@pytest.mark.parametrize(
    ("num", "share", "num_val"), [(1, 0.1, 0), (2, 0.1, 1), (2, 0.9, 1), (30, 0.1, 3), (3000, 0.1, 300), (9, 0.0, 0)]
)
def test_the_split(num: int, share: float, num_val: int) -> None:
    examples = [Example((i, i), 1) for i in range(num)]
    train, val = data.split(examples, share, seed=3)
    assert len(val) == num_val
    assert sorted([*train, *val], key=lambda e: e.input_ids) == examples
    assert (train, val) == data.split(examples, share, seed=3)
    if num >= 30:
        assert val != data.split(examples, share, seed=4)[1]


def realistic_lengths(num: int, cutoff: int, seed: int) -> list[int]:
    """Prompt and response tokens as in generated instruction data: log-normal, with a tail at the cutoff."""
    rng = random.Random(seed)
    return [min(cutoff, int(40 + rng.lognormvariate(3.5, 0.8) + rng.lognormvariate(4.3, 1.1))) for _ in range(num)]


@pytest.mark.parametrize("pack_tokens", [1024, 2048, 4096])
@pytest.mark.parametrize("num", [300, 3000])
def test_packs_are_98_percent_full(pack_tokens: int, num: int) -> None:
    lengths = realistic_lengths(num, 1024, seed=num)
    items = data.make_items(lengths, pack_tokens)
    assert sorted(i for item in items for i in item) == list(range(num))
    fills = [sum(lengths[i] for i in item) / pack_tokens for item in items]
    assert max(fills) <= 1
    assert sum(fills[:-1]) / (len(fills) - 1) >= 0.98  # the last item holds what is left
    assert sum(fills) / len(fills) >= (0.98 if num == 3000 else 0.95)


def test_each_epoch_visits_every_row_once_in_its_own_order() -> None:
    lengths = realistic_lengths(50, 256, seed=1)
    cfg = TrainConfig(batch_size=8, epochs=2, micro_batch_tokens=512, cutoff=256)
    steps = data.plan(lengths, cfg, seed=5)
    assert [step.number for step in steps] == list(range(1, 15))
    epochs = [[i for step in steps[a:b] for i in step.rows] for a, b in ((0, 7), (7, 14))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert [steps[0].epoch, steps[6].epoch, steps[13].epoch] == [0.16, 1.0, 2.0]
    assert steps == data.plan(lengths, cfg, seed=5) != data.plan(lengths, cfg, seed=6)
    for step in steps:
        parts = data.micro_batches(step.rows, lengths, 512, ALONE)
        assert all(sum(lengths[i] for i in part) <= 512 for part in parts)
        assert [i for part in parts for i in part] == list(step.rows)


def test_a_broken_number_of_epochs_is_rounded_up_to_steps() -> None:
    assert len(data.plan([10] * 20, TrainConfig(batch_size=8, epochs=0.5), 0)) == 2
    assert len(data.plan([10] * 20, TrainConfig(batch_size=8, epochs=1.5), 0)) == 5


def test_packed_items_make_the_steps() -> None:
    lengths = [30, 30, 30, 10, 10, 10]
    cfg = TrainConfig(cutoff=40, pack_tokens=40, batch_size=2, epochs=1, micro_batch_tokens=64)
    steps = data.plan(lengths, cfg, seed=0)
    assert [sum(lengths[i] for i in step.rows) for step in steps] == [80, 40]  # items of 40, two a step


@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_the_ranks_of_a_mesh_share_the_rows(num_rows: int) -> None:
    lengths = realistic_lengths(num_rows, 256, seed=2)
    parts = [data.micro_batches(range(num_rows), lengths, 512, Mesh(2, 2, rank)) for rank in range(4)]
    assert len({len(part) for part in parts}) == 1, "every rank makes as many passes"
    assert sorted(i for part in parts for rows in part for i in rows) == list(range(num_rows))
    load = [sum(lengths[i] for rows in part for i in rows) for part in parts]
    assert max(load) - min(load) <= max(lengths, default=0)


def test_rows_are_never_cut_into_micro_batches() -> None:
    assert data.cut([0, 1, 2, 3], [5, 5, 20, 1], 10) == ((0, 1), (2,), (3,))
