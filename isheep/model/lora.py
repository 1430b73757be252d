"""Low-rank adapters: y = x wᵀ + scaling · (x lora_Aᵀ) lora_Bᵀ, any number of them resident beside one frozen base.

An adapter lives inside the linear layers it changes; a batch names the one its tokens are seen through. So training,
sampling and scoring read the same fp32 tensors, and switching costs nothing. Files are in PEFT's format.
"""

import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isheep.artifacts import write_atomic
from isheep.config import UserError
from isheep.model import ops
from isheep.model.layers import Linear
from isheep.model.ops import Dropout, Projection
from isheep.model.transformer import Transformer

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """Paper §6: r 8, alpha 16, dropout 0.05, on every linear layer but lm_head. Targets are the last part of a name.

    The first `num_frozen` ranks are those of adapters trained before, which training leaves as they are.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ALL_LINEAR
    num_frozen: int = 0

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


class LoRAPair(nn.Module):
    """One layer's lora_A [r, in] and lora_B [out, r], fp32. `dropout` is set while training with one, else None."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, num_frozen: int = 0) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.scaling, self.num_frozen = scaling, num_frozen
        self.dropout: Dropout | None = None
        self._cast: tuple[object, Tensor, Tensor] | None = None

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and scaling · B in the compute dtype, remade when the trainer has written to either."""
        state = (self.lora_A._version, self.lora_B._version, dtype)
        if self._cast is None or self._cast[0] != state:
            with torch.inference_mode(False):  # made while sampling, they may be saved for a backward pass later
                self._cast = (state, self.lora_A.detach().to(dtype), (self.lora_B.detach() * self.scaling).to(dtype))
        return self._cast[1], self._cast[2]

    def projection(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Projection:
        """The layer with this pair as the kernels take it: trained where there are gradients, else in `dtype`."""
        if torch.is_grad_enabled():
            return Projection(weight, bias, self.lora_A, self.lora_B, self.scaling, self.dropout)
        return Projection(weight, bias, *self.cast(dtype), 1.0)

    def train_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output [T, out] for x [T, in], with gradients for x and for the ranks that are not frozen.

        Frozen ranks see no dropout: they count as merged into the weight.
        """
        n = self.num_frozen
        args = self.lora_A[n:], self.lora_B[:, n:], self.scaling, self.dropout
        y = ops.lora_linear_train(x, weight, bias, *args)
        if n:
            a, b = self.cast(x.dtype)
            y = y + (x @ a[:n].t()) @ b[:, :n].t()
        return y

    def sliced(self, part: tuple[int, int, int] | None) -> "LoRAPair":
        """The pair of a slice (dim, start, length) of its layer's weight: other views of the same tensors.

        Rows of the weight are rows of B, its columns are columns of A; None is the whole weight.
        """
        a, b = self.lora_A.detach(), self.lora_B.detach()
        if part is not None:
            dim, start, length = part
            a, b = (a, b.narrow(0, start, length)) if dim == 0 else (a.narrow(1, start, length), b)
        return LoRAPair(a, b, self.scaling)


@dataclass(frozen=True)
class Adapter:
    """A named set of pairs, keyed by the path of the layer each belongs to."""

    name: str
    config: LoRAConfig
    pairs: dict[str, LoRAPair]
    serial: int = field(default_factory=count().__next__)  # of all that were ever attached

    @property
    def version(self) -> tuple[int, int]:
        """Grows with every write to a tensor of the adapter: cached keys and values of another version are stale.

        No other adapter ever has it, not even one that takes this one's name.
        """
        return self.serial, sum(p._version for p in self.parameters())

    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self._parameters

    @cached_property
    def _parameters(self) -> tuple[nn.Parameter, ...]:  # at every step `version` asks: modules are walked once
        return tuple(p for pair in self.pairs.values() for p in pair.parameters())

    def set_dropout(self, key: int, tokens: Tensor) -> None:
        """Masks of the next passes, over these tokens [T] int64, are functions of (key, layer, token, column).

        A token's number is its own wherever it is packed, and no other token's that is seen under the same key.
        """
        for i, pair in enumerate(self.pairs.values()):
            pair.dropout = Dropout(self.config.dropout, (key * 1_000_003 + i) % 2**63, tokens)

    def clear_dropout(self) -> None:
        for pair in self.pairs.values():
            pair.dropout = None


def attach(model: Transformer, config: LoRAConfig, name: str, seed: int = 0) -> Adapter:
    """Put a fresh adapter on the model: A uniform as PEFT draws it, B zero, so that it changes nothing yet.

    Raises UserError where no layer matches the targets or the name is taken.
    """
    if "." in name or name in model.adapters:
        raise UserError(f'An adapter cannot be called "{name}": names are unique and hold no dot.')
    targets = {path: m for path, m in model.named_modules() if isinstance(m, Linear)}
    unknown = set(config.target_modules) - {path.rpartition(".")[2] for path in targets}
    if unknown:
        raise UserError(f"No linear layer is called {', '.join(sorted(unknown))}; there are {', '.join(ALL_LINEAR)}.")
    generator, device = torch.Generator().manual_seed(seed), model.device
    pairs = {}
    for path, linear in targets.items():
        if path.rpartition(".")[2] in config.target_modules:
            out_features, in_features = linear.weight.shape
            bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5)
            lora_A = torch.empty(config.r, in_features).uniform_(-bound, bound, generator=generator)
            lora_B = torch.zeros(out_features, config.r)
            linear.lora[name] = pairs[path] = LoRAPair(
                lora_A.to(device), lora_B.to(device), config.scaling, config.num_frozen
            )
    model.adapters[name] = adapter = Adapter(name, config, pairs)
    return adapter


def attach_onto(model: Transformer, before: str, config: LoRAConfig, name: str, seed: int = 0) -> Adapter:
    """Put an adapter on the model that is `before` and `config.r` fresh ranks more: a sum of LoRAs is a LoRA.

    Training changes the fresh ranks alone. So adapters are stacked, exactly, where other programs merge them.
    """
    below = model.adapters[before]
    n, r = below.config.r, below.config.r + config.r
    assert below.config.scaling == config.scaling, "ranks of one adapter share its scaling"
    adapter = attach(model, replace(config, r=r, alpha=config.scaling * r, num_frozen=n), name, seed)
    with torch.no_grad():
        for path, pair in adapter.pairs.items():
            pair.lora_A[:n] = below.pairs[path].lora_A
            pair.lora_B[:, :n] = below.pairs[path].lora_B
    return adapter


def detach(model: Transformer, name: str) -> None:
    """Take an adapter off; the base was never changed, so nothing is restored."""
    for path in model.adapters.pop(name).pairs:
        del model.get_submodule(path).lora[name]  # type: ignore[operator, union-attr]


def save_adapter(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT names them."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.config.r,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": list(adapter.config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "adapter_model.safetensors.tmp"
    save_file(adapter_tensors(adapter), part, metadata={"format": "pt"})
    part.replace(folder / "adapter_model.safetensors")
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys."""
    return {
        f"base_model.model.{path}.{part}.weight": getattr(pair, part).detach().cpu().contiguous()
        for path, pair in adapter.pairs.items()
        for part in ("lora_A", "lora_B")
    }


def load_adapter(model: Transformer, folder: Path, name: str) -> Adapter:
    """Attach an adapter saved by `save_adapter` or by PEFT. Raises UserError where it does not fit the model."""
    try:
        raw = json.loads((folder / "adapter_config.json").read_text())
        r, alpha = raw["r"], raw["lora_alpha"]
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not an adapter in PEFT's format (adapter_config.json + adapter_model.safetensors): {error}"
        ) from error
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if raw.get(key):
            raise UserError(f'The adapter {folder} uses "{key}", which is not supported: only plain LoRA is.')
    found = {key.removeprefix("base_model.model.").rsplit(".", 2)[0].rpartition(".")[2] for key in tensors}
    targets = tuple(t for t in ALL_LINEAR if t in found)
    config = LoRAConfig(r, alpha, raw.get("lora_dropout", 0.0), targets)
    adapter = attach(model, config, name)
    try:
        fill_adapter(adapter, tensors)
    except UserError:
        detach(model, name)
        raise
    return adapter


def fill_adapter(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Copy tensors under PEFT's keys into the adapter, in place. Raises UserError where keys or shapes differ."""
    own = adapter_tensors(adapter)
    if own.keys() != tensors.keys():
        key = min(own.keys() ^ tensors.keys())
        raise UserError(f'The adapter "{adapter.name}" does not fit this model: "{key}" is only on one side.')
    for path, pair in adapter.pairs.items():
        for part in ("lora_A", "lora_B"):
            source, target = tensors[f"base_model.model.{path}.{part}.weight"], getattr(pair, part)
            if source.shape != target.shape:
                raise UserError(
                    f'The adapter "{adapter.name}" does not fit this model: {path}.{part} is {tuple(source.shape)}, '
                    f"the model's layer takes {tuple(target.shape)}."
                )
            with torch.no_grad():
                target.copy_(source)
