"""What a killed training goes on from: one safetensors file, replaced whole, and the seal of a finished one.

The file holds the adapter, the optimizer's state, the best adapter so far and, in its header, where the run stands.
No random state is needed: every draw of the trainer is a function of (seed, step).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer

from isheep.artifacts import adopt, canonical_json, write_atomic, writes_to
from isheep.config import TrainConfig, UserError, diff, settings
from isheep.model.lora import Adapter, adapter_tensors, fill_adapter

# Settings that change when or where something is computed, but no result.
NO_RESULT = ("checkpoint_steps", "gradient_checkpointing")
# What a finished training leaves, besides its seal.
TRAINED = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "train_log.jsonl")


@dataclass
class State:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    log_len: int = 0  # bytes of train_log.jsonl that belong to these steps
    loss: float | None = None  # of the last step
    best_val_loss: float | None = None
    best_step: int | None = None
    num_tokens: int = 0
    num_loss_tokens: int = 0
    time_s: float = 0.0
    step_time_s: float = 0.0  # time_s without evaluation and checkpoints
    best: dict[str, Tensor] = field(default_factory=dict)  # the adapter at best_step, under PEFT's keys; not in JSON

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "best"}


def fingerprint(cfg: TrainConfig, adapter: Adapter, **more: Any) -> dict[str, Any]:
    """Everything the result depends on, as plain values; of r, alpha, dropout and targets the adapter's own count."""
    train = {k: v for k, v in (settings(cfg) | settings(adapter.config)).items() if k not in NO_RESULT}
    return json.loads(canonical_json({"train": train, "initial_adapter": _sha256(adapter_tensors(adapter)), **more}))


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()


class Checkpoint:
    """The files of one training in `out`. `made_from` is its fingerprint; another one on disk is a UserError.

    A training that is not begun is taken from the first of `others`, folders of other runs, that has the same.
    """

    def __init__(self, out: Path, made_from: Mapping[str, Any], others: Iterable[Path] = ()) -> None:
        self.path = out / "checkpoint.safetensors"
        self.seal_path = out / "train_summary.json"
        self.made_from = made_from
        if not self.seal_path.exists() and not self.path.exists():
            adopt(self.seal_path, others, TRAINED, lambda seal: seal.get("made_from") == made_from)

    def sealed(self) -> dict[str, Any] | None:
        """The summary of a training that is finished; None where there is none."""
        if not self.seal_path.exists():
            return None
        try:
            seal = json.loads(self.seal_path.read_bytes())
        except ValueError as error:
            raise UserError(f"{self.seal_path} is damaged ({error}): delete it to train again.") from error
        self._compare(seal.pop("made_from", {}), self.seal_path)
        self.path.unlink(missing_ok=True)  # a kill may have come between the seal and this
        return seal

    def seal(self, summary: Mapping[str, Any]) -> None:
        """Declare the training finished, and drop what was kept for a resume."""
        write_atomic(self.seal_path, json.dumps({**summary, "made_from": self.made_from}, indent=1) + "\n")
        self.path.unlink(missing_ok=True)

    def save(self, adapter: Adapter, optimizer: Optimizer, state: State) -> None:
        """Replace the checkpoint by one of this moment: a kill leaves either the old or the new."""
        tensors = {f"adapter/{key}": tensor for key, tensor in adapter_tensors(adapter).items()}
        tensors |= {f"best/{key}": tensor for key, tensor in state.best.items()}
        for i, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": tensor.cpu() for name, tensor in values.items()}
        header = {"state": canonical_json(state.to_json()), "made_from": canonical_json(self.made_from)}
        write_atomic(self.path, save(tensors, header))

    def load(self, adapter: Adapter, optimizer: Optimizer) -> State | None:
        """Put adapter and optimizer back to where the run stood; None, and nothing done, where no checkpoint is."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
            state, made_from = json.loads(header["state"]), json.loads(header["made_from"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): delete it to train from the start.") from error
        self._compare(made_from, self.path)
        fill_adapter(adapter, _under("adapter/", tensors))
        values: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _under("optimizer/", tensors).items():
            i, _, name = key.partition("/")
            values.setdefault(int(i), {})[name] = tensor
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
        return State(**state, best=_under("best/", tensors))

    def _compare(self, found: Mapping[str, Any], file: Path) -> None:
        changed = diff(found, self.made_from)
        if changed:
            raise UserError(
                f"{file} was made with other {', '.join(changed[:6])}: choose another --out, restore them, or delete "
                "that file to train again."
            )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


class TrainLog:
    """train_log.jsonl: one row a step. Opened at the length that the checkpoint knows; what came later is redone."""

    def __init__(self, path: Path, known_len: int) -> None:
        self.path = path
        with writes_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            if path.stat().st_size < known_len:
                raise UserError(
                    f"{path} is shorter than its checkpoint says: put it back, or delete checkpoint.safetensors beside "
                    "it to train from the start."
                )
            self._file.truncate(known_len)

    def write(self, row: Mapping[str, Any]) -> None:
        with writes_to(self.path):
            self._file.write(canonical_json(row).encode() + b"\n")

    def sync(self) -> int:
        """Bytes written, now on the disk: a checkpoint must not know more than the log has."""
        with writes_to(self.path):
            os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()
