"""The training loop: AdamW on an adapter's fp32 tensors, on packed rows, resumable at any step.

`train` is called by the driver's train stage and by `python -m isheep.train`. It trains the live adapter of a loaded
model and leaves the model as it found it, so that sampling goes on in the same process.
"""

import hashlib
import math
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from isheep.cli import Opened
from isheep.config import TrainConfig, UserError
from isheep.log import Progress, log
from isheep.mesh import ALONE, Mesh
from isheep.model.lora import Adapter, LoRAConfig, adapter_tensors, attach, fill_adapter, save_adapter
from isheep.model.parallel import share_adapter
from isheep.model.transformer import Transformer
from isheep.train import data
from isheep.train.checkpoint import Checkpoint, State, TrainLog, fingerprint
from isheep.train.data import Example, Step


@dataclass(frozen=True)
class TrainSummary:
    """One finished training. Losses are means over the counted tokens; `fill` is the share of `pack_tokens` used."""

    num_rows: int
    num_val_rows: int
    num_steps: int
    num_tokens: int  # through the model in optimizer steps
    num_loss_tokens: int
    final_loss: float
    best_val_loss: float | None
    best_step: int | None  # None: no validation rows, the last step's adapter is kept
    fill: float | None  # None: rows are not packed into items
    time_s: float
    tok_per_s: float  # of the optimizer steps alone
    peak_gib: float  # resident memory on a CPU, allocated memory on a GPU


def train(
    model: Transformer,
    adapter: Adapter,
    train_examples: Sequence[Example],
    val_examples: Sequence[Example],
    cfg: TrainConfig,
    out: Path,
    seed: int,
    base_model: str,
    mesh: Mesh = ALONE,
    others: Iterable[Path] = (),
) -> TrainSummary:
    """Train `adapter` in place, on all ranks of the mesh.

    It ends as the one with the lowest validation loss, or the last one where there are no validation rows.

    writes  out/adapter/ (PEFT's format), out/train_log.jsonl (one row a step, the same bytes however often the run was
            stopped), out/train_summary.json (the seal); out/checkpoint.safetensors while it is not finished
    A finished training is read back and not repeated, also one of the `others`, which are folders like `out`. Raises
    UserError where `out` was made from other settings or rows, where a row is longer than the model's context, and
    where the loss is no longer a number.
    """
    _check(model, [*train_examples, *val_examples])
    rows = {"train": data.fingerprint(train_examples), "validation": data.fingerprint(val_examples)}
    run = {"seed": seed, "base_model": base_model, "dtype": str(model.dtype).removeprefix("torch.")}
    checkpoint = Checkpoint(out, fingerprint(cfg, adapter, rows=rows, **run), others)
    sealed = checkpoint.sealed()
    if sealed is not None:
        log.info("%s is trained already: %d steps", out, sealed["num_steps"])
        fill_adapter(adapter, load_file(out / "adapter" / "adapter_model.safetensors"))
        share_adapter(adapter, mesh)
        return TrainSummary(**sealed)
    examples = {"train_examples": train_examples, "val_examples": val_examples}
    mesh.command("train", name=adapter.name, config=adapter.config, **examples, cfg=cfg, seed=seed)
    trainer = Trainer(model, adapter, train_examples, val_examples, cfg, seed, mesh)
    _run(trainer, checkpoint, out)
    if trainer.state.best:
        fill_adapter(adapter, trainer.state.best)
    share_adapter(adapter, mesh)
    save_adapter(adapter, out / "adapter", base_model)
    summary = trainer.summary()
    checkpoint.seal(asdict(summary))
    return summary


def follow(opened: Opened, mesh: Mesh, name: str, config: LoRAConfig, **what: Any) -> None:
    """A follower's part in a training: every step that the leader makes; `what` goes to its `Trainer`."""
    adapter = opened.model.adapters.get(name) or attach(opened.model, config, name)
    trainer = Trainer(opened.model, adapter, **what, mesh=mesh)
    trainer.align()
    with trainer.training(), suppress(UserError):  # the leader meets the same one, and says it
        for step in trainer.steps[trainer.state.step :]:
            trainer.step(step)
            if trainer.is_evaluated(step):
                trainer.evaluate()


def _check(model: Transformer, examples: Sequence[Example]) -> None:
    if not examples:
        raise UserError("there is nothing to train on: the data set has no usable row.")
    longest = max(len(example.input_ids) for example in examples)
    if longest > model.config.context_len:
        raise UserError(
            f"a row of {longest} tokens is longer than the model's context of {model.config.context_len}: set "
            f"train.cutoff to {model.config.context_len} or less."
        )


def _run(trainer: "Trainer", checkpoint: Checkpoint, out: Path) -> None:
    """All steps that are still to do, with evaluation, log and checkpoints."""
    cfg, total = trainer.cfg, len(trainer.steps)
    before = checkpoint.load(trainer.adapter, trainer.optimizer)
    if before is not None:
        trainer.state = before
        log.info("training goes on after step %d of %d", before.step, total)
    elif total <= cfg.warmup_steps:
        most = learning_rate(total, total, cfg)
        log.warning("%d warm-up steps but only %d steps: the learning rate ends at %.1e", cfg.warmup_steps, total, most)
    trainer.align()
    state = trainer.state
    with closing(TrainLog(out / "train_log.jsonl", state.log_len)) as train_log, trainer.training():
        if before is None:  # now, so that a start with other settings is seen before the first regular one
            checkpoint.save(trainer.adapter, trainer.optimizer, state)
        with Progress("train", total, "steps") as bar:
            bar.update(state.step)
            for step in trainer.steps[state.step :]:
                started = time.perf_counter()
                row = trainer.step(step)
                state.step_time_s += time.perf_counter() - started
                evaluated = trainer.is_evaluated(step)
                if evaluated:
                    row["val_loss"] = trainer.evaluate()
                train_log.write(row)
                state.time_s += time.perf_counter() - started
                if step.number == total or evaluated or step.number % cfg.checkpoint_steps == 0:
                    state.log_len = train_log.sync()
                    checkpoint.save(trainer.adapter, trainer.optimizer, state)
                speed = f"{state.num_tokens / state.step_time_s:.0f} tok/s"
                bar.update(loss=f"{row['loss']:.4f}", speed=speed)


class Trainer:
    """A model, the adapter that is trained, and the plan of all steps. The loop around it is `train`."""

    def __init__(
        self,
        model: Transformer,
        adapter: Adapter,
        train_examples: Sequence[Example],
        val_examples: Sequence[Example],
        cfg: TrainConfig,
        seed: int,
        mesh: Mesh = ALONE,
    ) -> None:
        self.model, self.adapter, self.cfg, self.seed, self.mesh = model, adapter, cfg, seed, mesh
        self.train_examples, self.val_examples = train_examples, val_examples
        self.parameters = list(adapter.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
        )
        self.lengths = [len(example.input_ids) for example in train_examples]
        self.steps = data.plan(self.lengths, cfg, seed)
        self.state = State()

    def align(self) -> None:
        """Start all ranks from the leader's adapter, optimizer and step."""
        mine = self.state.step, adapter_tensors(self.adapter), self.optimizer.state_dict()
        step, tensors, optimizer = self.mesh.share(mine)
        if not self.mesh.leads:
            fill_adapter(self.adapter, tensors)
            self.optimizer.load_state_dict(optimizer)
            self.state.step = step

    def is_evaluated(self, step: Step) -> bool:
        """Whether the validation loss is taken after this step."""
        return bool(self.val_examples) and (step.number == len(self.steps) or step.number % self.cfg.eval_steps == 0)

    @contextmanager
    def training(self) -> Iterator[None]:
        """The model as training needs it; afterwards as it was, with no gradient and no dropout left."""
        before = self.model.gradient_checkpointing
        self.model.gradient_checkpointing = self.cfg.gradient_checkpointing
        try:
            yield
        finally:
            self.model.gradient_checkpointing = before
            self.adapter.clear_dropout()
            self.optimizer.zero_grad()

    def step(self, step: Step) -> dict[str, Any]:
        """One optimizer step -> its row of the log. The loss is the mean over all counted tokens of the step."""
        examples = [self.train_examples[i] for i in step.rows]
        num_loss_tokens = sum(example.num_loss_tokens for example in examples)
        lr = learning_rate(step.number, len(self.steps), self.cfg)
        with self.mesh.together():
            loss = self._backward(step, num_loss_tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"the loss is {loss} and its gradient's norm {norm} at step {step.number} (learning rate {lr:.2e}): "
                f"train into another --out with a lower train.learning_rate, or with --dtype float32; the state after "
                "an earlier step is kept."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        # the fused step does not count as a write, but casts and cached keys of the old tensors are stale now
        torch.autograd.graph.increment_version(self.parameters)
        self.optimizer.zero_grad()
        num_tokens = sum(len(example.input_ids) for example in examples)
        self.state.step, self.state.loss = step.number, loss
        self.state.num_tokens += num_tokens
        self.state.num_loss_tokens += num_loss_tokens
        row = {"step": step.number, "epoch": step.epoch, "loss": loss, "learning_rate": lr, "grad_norm": norm}
        return {**row, "num_tokens": num_tokens, "num_loss_tokens": num_loss_tokens}

    def _backward(self, step: Step, num_loss_tokens: int) -> float:
        """Leave the gradients of the step's mean loss, summed over the ranks, in the adapter -> that loss."""
        total = torch.zeros((), dtype=torch.float32, device=self.model.device)
        for rows in data.micro_batches(step.rows, self.lengths, self.cfg.micro_batch_tokens, self.mesh):
            part = [self.train_examples[i] for i in rows] or [data.EMPTY]
            if self.adapter.config.dropout:
                tokens = data.token_names(rows or [0], part, self.model.device)
                self.adapter.set_dropout(dropout_key(self.seed, step.number), tokens)
            part_loss = self._nll(part) / num_loss_tokens
            part_loss.backward()
            total += part_loss.detach()
        self.mesh.sum_([total, *(p.grad for p in self.parameters if p.grad is not None)])
        return total.item()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the counted tokens of the validation rows; keeps the adapter if it is the best so far."""
        self.adapter.clear_dropout()
        lengths = [len(example.input_ids) for example in self.val_examples]
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        with self.mesh.together():
            for rows in data.micro_batches(range(len(lengths)), lengths, self.cfg.micro_batch_tokens, self.mesh):
                total += self._nll([self.val_examples[i] for i in rows] or [data.EMPTY])
            self.mesh.sum_([total])
        loss = total.item() / sum(example.num_loss_tokens for example in self.val_examples)
        if self.state.best_val_loss is None or loss < self.state.best_val_loss:
            self.state.best_val_loss, self.state.best_step = loss, self.state.step
            self.state.best = {key: tensor.clone() for key, tensor in adapter_tensors(self.adapter).items()}
        return loss

    def _nll(self, examples: Sequence[Example]) -> Tensor:
        """Summed negative log-likelihood of the counted tokens, fp32. Only their rows meet the head."""
        batch, targets = data.pack(examples, self.model.device, self.adapter.name)
        hidden = self.model(batch)
        return self.model.nll(hidden, targets, self.cfg.loss_chunk_tokens).sum()

    def summary(self) -> TrainSummary:
        state = self.state
        assert state.loss is not None, "no step was made"
        pack_tokens = self.cfg.pack_tokens
        num_items = len(data.make_items(self.lengths, pack_tokens))
        return TrainSummary(
            num_rows=len(self.train_examples),
            num_val_rows=len(self.val_examples),
            num_steps=len(self.steps),
            num_tokens=state.num_tokens,
            num_loss_tokens=state.num_loss_tokens,
            final_loss=state.loss,
            best_val_loss=state.best_val_loss,
            best_step=state.best_step,
            fill=round(sum(self.lengths) / (num_items * pack_tokens), 4) if pack_tokens else None,
            time_s=round(state.time_s, 3),
            tok_per_s=round(state.num_tokens / state.step_time_s, 1),
            peak_gib=round(_peak_gib(self.model.device), 3),
        )


def learning_rate(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Of step 1 … num_steps: linear warm-up from 0, then half a cosine down to 0, as transformers computes it."""
    made = step - 1
    if made < cfg.warmup_steps:
        return cfg.learning_rate * made / cfg.warmup_steps
    if cfg.lr_scheduler == "constant":
        return cfg.learning_rate
    progress = (made - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    return cfg.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def dropout_key(seed: int, step: int) -> int:
    """A number of its own for each step of a run: resumed or not, and however its rows are packed, the same masks."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest(), "little")


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
