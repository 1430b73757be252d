"""The loop against peft + transformers, against itself in other batches, and its best checkpoint."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from isheep.config import TrainConfig, UserError
from isheep.mesh import ALONE
from isheep.model.batch import PackedBatch
from isheep.model.lora import Adapter, LoRAConfig, adapter_tensors, attach, load_adapter, save_adapter
from isheep.model.transformer import Transformer
from isheep.train import data
from isheep.train.data import Example
from isheep.train.trainer import Trainer, learning_rate, train
from tests.tiny import tiny_model, transformers_twin

VOCAB = 320


def examples(num: int, seed: int = 0, longest: int = 40) -> list[Example]:
    rng = random.Random(seed)
    lens = [(rng.randint(1, longest // 2), rng.randint(1, longest // 2)) for _ in range(num)]
    # the second half of a row repeats its first tokens, so that there is something to learn
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n, _ in lens]
    return [Example((*prompt, *(prompt * m)[:m]), len(prompt)) for prompt, (_, m) in zip(prompts, lens, strict=True)]


def tiny_with_adapter(dropout: float = 0.0, seed: int = 1) -> tuple[Transformer, Adapter]:
    model = tiny_model()
    return model, attach(model, LoRAConfig(r=4, dropout=dropout), "a", seed)


def settings(**changes: Any) -> TrainConfig:
    defaults = {"learning_rate": 1e-2, "warmup_steps": 3, "batch_size": 6, "micro_batch_tokens": 64, "dropout": 0.0}
    return TrainConfig(**{"r": 4, "epochs": 1.0, "val_share": 0.0, **defaults, **changes})


def micro_batches(trainer: Trainer, step: data.Step) -> list[tuple[int, ...]]:
    return data.micro_batches(step.rows, trainer.lengths, trainer.cfg.micro_batch_tokens, ALONE)


def peft_losses(
    twin: torch.nn.Module, folder: Path, rows: Sequence[Example], trainer: Trainer
) -> tuple[list[float], torch.nn.Module]:
    """A plain loop in peft and transformers over the same steps: padded batches, labels of -100."""
    from peft import PeftModel
    from transformers import get_cosine_schedule_with_warmup

    model = PeftModel.from_pretrained(twin, folder, is_trainable=True)
    cfg, steps = trainer.cfg, trainer.steps
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, cfg.warmup_steps, len(steps))
    losses = []
    for step in steps:
        chosen = [[rows[i] for i in part] for part in micro_batches(trainer, step)]
        counted = sum(row.num_loss_tokens for part in chosen for row in part)
        total = 0.0
        for part in chosen:
            width = max(len(row.input_ids) for row in part)
            ids = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in part])
            mask = torch.tensor([[int(i < len(row.input_ids)) for i in range(width)] for row in part])
            place = torch.arange(width)
            starts = torch.tensor([row.num_prompt_tokens for row in part])[:, None]
            labels = ids.masked_fill((mask == 0) | (place < starts), -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=counted).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model


@pytest.mark.parametrize("pack_tokens", [None, 80])
def test_twenty_steps_equal_peft(tmp_path: Path, pack_tokens: int | None) -> None:
    rows = examples(60 if pack_tokens is None else 240)
    model, adapter = tiny_with_adapter()
    twin = transformers_twin(model, tmp_path / "model")
    save_adapter(adapter, tmp_path / "start", "tiny")
    cfg = settings(epochs=2.0, max_grad_norm=0.5, cutoff=40, pack_tokens=pack_tokens, eval_steps=5)
    trainer = Trainer(model, adapter, rows, [], cfg, seed=2)
    assert len(trainer.steps) >= 20
    assert max(len(micro_batches(trainer, step)) for step in trainer.steps) > 1  # gradients are accumulated
    summary = train(model, adapter, rows, [], cfg, tmp_path / "out", 2, "tiny")
    log = [json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()]
    expected, peer = peft_losses(twin, tmp_path / "start", rows, trainer)

    assert [row["loss"] for row in log] == pytest.approx(expected, rel=1e-4)
    assert max(row["grad_norm"] for row in log) > 0.5  # clipping had work to do
    assert expected[-1] < 0.9 * expected[0]
    assert summary.final_loss == log[-1]["loss"]
    theirs = {k.replace(".default", ""): p for k, p in peer.named_parameters() if "lora_" in k}
    for key, tensor in adapter_tensors(adapter).items():
        torch.testing.assert_close(tensor, theirs[key].detach(), rtol=1e-3, atol=2e-5)
    assert (log[0]["learning_rate"], log[3]["learning_rate"]) == (0.0, cfg.learning_rate)


def test_the_saved_adapter_gives_the_same_logits_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapter = tiny_with_adapter()
    twin = transformers_twin(model, tmp_path / "model")
    train(model, adapter, examples(12), [], settings(epochs=4), tmp_path / "out", 0, "tiny")
    peer = PeftModel.from_pretrained(twin, tmp_path / "out" / "adapter")
    ids = torch.arange(3, 33)
    with torch.no_grad():
        theirs = peer(input_ids=ids[None]).logits[0]
        ours = model.logits(model(PackedBatch.pack([ids.tolist()], "cpu", "a")))
        plain = model.logits(model(PackedBatch.pack([ids.tolist()], "cpu")))
    scale = (theirs.max() - theirs.min()).item()
    assert (ours - theirs).abs().max() <= 1e-4 * scale
    assert (ours - plain).abs().max() > 1e-2 * scale  # the training did something
    loaded = load_adapter(model, tmp_path / "out" / "adapter", "b")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), adapter.parameters(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_equal_one_by_one(checkpointing: bool) -> None:
    rows = examples(6, seed=4)
    grads = []
    for tokens in (10_000, 1):  # all rows in one forward; one forward a row
        model, adapter = tiny_with_adapter()
        for pair in adapter.pairs.values():
            torch.nn.init.normal_(pair.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
        cfg = settings(micro_batch_tokens=tokens, gradient_checkpointing=checkpointing, max_grad_norm=1e9)
        trainer = Trainer(model, adapter, rows, [], cfg, seed=0)
        trainer.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]  # keeps the gradients to look at
        with trainer.training():
            row = trainer.step(trainer.steps[0])
            grads.append((row["loss"], [p.grad.clone() for p in adapter.parameters()]))  # type: ignore[union-attr]
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-6)
    for one, other in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_draw_depends_on_the_micro_batches(checkpointing: bool) -> None:
    """With dropout too, three steps in one forward each equal three steps in a forward a row."""
    rows, runs = examples(18, seed=4), []
    for tokens in (10_000, 70, 1):
        model, adapter = tiny_with_adapter(dropout=0.3)
        for pair in adapter.pairs.values():
            torch.nn.init.normal_(pair.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
        cfg = settings(
            micro_batch_tokens=tokens, gradient_checkpointing=checkpointing, warmup_steps=0, learning_rate=1e-3
        )
        trainer = Trainer(model, adapter, rows, [], cfg, seed=0)
        assert len(trainer.steps) == 3
        grads: list[torch.Tensor] = []
        trainer.optimizer.register_step_pre_hook(lambda *_, to=grads, of=adapter: to.extend(_gradients(of)))
        with trainer.training():
            log = [trainer.step(step) for step in trainer.steps]
        runs.append(([row["loss"] for row in log], grads, [p.detach() for p in adapter.parameters()]))
    (losses, grads, ends), *others = runs
    for other_losses, other_grads, other_ends in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for one, other in zip([*grads, *ends], [*other_grads, *other_ends], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def _gradients(adapter: Adapter) -> list[torch.Tensor]:
    return [p.grad.clone() for p in adapter.parameters()]  # type: ignore[union-attr]


def test_without_dropout_no_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("isheep.train.data.token_names")
    model, adapter = tiny_with_adapter()
    trainer = Trainer(model, adapter, examples(6), examples(6), settings(), 0)
    with trainer.training():
        trainer.step(trainer.steps[0])
        assert all(pair.dropout is None for pair in adapter.pairs.values())
        trainer.evaluate()


def test_the_best_adapter_is_kept_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, adapter = tiny_with_adapter(dropout=0.1)
    ids = PackedBatch.pack([list(range(20))], "cpu")
    with torch.no_grad():
        before = model(ids)
    # other rows than the training's: so high a learning rate soon makes them worse
    cfg = settings(learning_rate=0.05, epochs=6, eval_steps=1, warmup_steps=0, lr_scheduler="constant")
    summary = train(model, adapter, examples(12), examples(6, seed=9), cfg, tmp_path, 0, "tiny")
    log = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in log]
    assert len(losses) == summary.num_steps == 12
    assert summary.best_val_loss == min(losses)
    assert summary.best_step == losses.index(min(losses)) + 1 < len(losses)
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    live = adapter_tensors(adapter)
    assert all(torch.equal(saved[key], live[key]) for key in live)
    with torch.no_grad():  # the live adapter is the one whose loss was the best
        assert Trainer(model, adapter, [], examples(6, seed=9), cfg, 0).evaluate() == pytest.approx(min(losses))
        assert torch.equal(model(ids), before)
    assert model.gradient_checkpointing is False
    assert all(pair.dropout is None for pair in adapter.pairs.values())
    assert all(p.grad is None for p in adapter.parameters())


def test_every_step_is_seen_by_what_depends_on_the_adapter(tmp_path: Path) -> None:
    """Sampling and evaluation keep casts, and the sampler cached keys, by the version of the adapter's tensors."""
    model, adapter = tiny_with_adapter()
    trainer = Trainer(model, adapter, examples(12), examples(6), settings(epochs=3), 0)
    versions, losses = [], []
    with trainer.training():
        for step in trainer.steps:
            trainer.step(step)
            versions.append(adapter.version)
            losses.append(trainer.evaluate())
    assert len(set(versions)) == len(trainer.steps)
    save_adapter(adapter, tmp_path, "tiny")
    fresh = tiny_model()
    again = Trainer(fresh, load_adapter(fresh, tmp_path, "a"), examples(12), examples(6), settings(), 0)
    assert again.evaluate() == losses[-1]


def test_dropout_acts_in_training_only_and_follows_the_seed(tmp_path: Path) -> None:
    losses = []
    for name, dropout, seed in (("a", 0.3, 0), ("b", 0.3, 0), ("c", 0.0, 0)):
        model, adapter = tiny_with_adapter(dropout)
        train(model, adapter, examples(12), [], settings(epochs=3), tmp_path / name, seed, "tiny")
        losses.append((tmp_path / name / "train_log.jsonl").read_bytes())
    assert losses[0] == losses[1] != losses[2]


class Shapes(TorchDispatchMode):
    """Remembers the largest tensor with a dimension of `size`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.most_rows = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.size in tensor.shape:
                self.most_rows = max(self.most_rows, tensor.numel() // self.size)
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_tensor_of_all_logits_is_ever_made(checkpointing: bool) -> None:
    model, adapter = tiny_model(vocab_size=1999), None
    adapter = attach(model, LoRAConfig(r=4), "a")
    rows = examples(24, longest=60)
    cfg = settings(batch_size=24, micro_batch_tokens=2048, loss_chunk_tokens=16, gradient_checkpointing=checkpointing)
    trainer = Trainer(model, adapter, rows, rows, cfg, seed=0)
    (part,) = micro_batches(trainer, trainer.steps[0])
    assert sum(rows[i].num_loss_tokens for i in part) > 200
    weight_rows = model.config.hidden_size  # the embedding and its transpose have the vocabulary as a dimension too
    with trainer.training(), Shapes(1999) as shapes:
        trainer.step(trainer.steps[0])
        trainer.evaluate()
    assert 16 <= shapes.most_rows <= max(16, weight_rows)


def test_the_learning_rate_is_transformers(tmp_path: Path) -> None:
    from transformers import get_cosine_schedule_with_warmup

    for warmup, num_steps in ((20, 100), (0, 7), (20, 6), (5, 5)):
        cfg = settings(warmup_steps=warmup, learning_rate=3e-4)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
        for step in range(1, num_steps + 1):
            assert math.isclose(learning_rate(step, num_steps, cfg), schedule.get_last_lr()[0], abs_tol=1e-12)
            optimizer.step()
            schedule.step()


def test_a_loss_that_is_no_number_stops_with_one_sentence(tmp_path: Path) -> None:
    model, adapter = tiny_with_adapter()
    cfg = settings(learning_rate=1e30, epochs=5, warmup_steps=0, max_grad_norm=1e30, checkpoint_steps=1)
    with pytest.raises(UserError, match=r"at step [2-9].*learning_rate"):
        train(model, adapter, examples(12), [], cfg, tmp_path, 0, "tiny")
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert model.gradient_checkpointing is False


def test_a_row_beyond_the_context_and_no_rows(tmp_path: Path) -> None:
    model, adapter = tiny_with_adapter()
    with pytest.raises(UserError, match=r"513 tokens.*context of 512"):
        train(model, adapter, [Example((1,) * 513, 3)], [], settings(), tmp_path, 0, "tiny")
    with pytest.raises(UserError, match="nothing to train on"):
        train(model, adapter, [], [], settings(), tmp_path, 0, "tiny")
