"""Adapters against peft's, from the same A and B, in fp32."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from isheep.config import UserError
from isheep.model import ops
from isheep.model.batch import PackedBatch
from isheep.model.lora import LoRAConfig, adapter_tensors, attach, attach_onto, detach, load_adapter, save_adapter
from tests.tiny import tiny_model, transformers_twin

CONFIG = LoRAConfig(r=4, alpha=12, dropout=0.0)
SEQUENCES = [list(range(3, 40)), list(range(200, 180, -1)), [7]]


def randomised(adapter, seed=0):
    """An adapter that has been trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.1)
    return adapter


def nll(model, sequences, adapter):
    """Summed over the tokens after the first of each sequence."""
    batch = PackedBatch.pack(sequences, "cpu", adapter)
    targets = torch.tensor([t for s in sequences for t in [*s[1:], ops.IGNORE]])
    return model.nll(model(batch), targets, 16).sum()


def gradients(model, adapter, sequences=SEQUENCES):
    for parameter in adapter.parameters():
        parameter.grad = None
    nll(model, sequences, adapter.name).backward()
    return {
        (path, part): getattr(pair, part).grad.clone()
        for path, pair in adapter.pairs.items()
        for part in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2_gqa_tied", "qwen3_head_dim"])
def test_gradients_equal_pefts(name, tmp_path, backend):
    model = tiny_model(name)
    twin = transformers_twin(model, tmp_path, name)
    adapter = randomised(attach(model, CONFIG, "default"))
    peft_config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=list(CONFIG.target_modules))
    theirs = get_peft_model(twin, peft_config)
    named = dict(theirs.named_parameters())
    for key, tensor in adapter_tensors(adapter).items():
        named[key.replace(".weight", ".default.weight")].data.copy_(tensor)
    for ids in SEQUENCES:
        logits = theirs(torch.tensor([ids])).logits[0]
        F.cross_entropy(logits[:-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="sum").backward()
    for (path, part), grad in gradients(model, adapter).items():
        expected = named[f"base_model.model.{path}.{part}.default.weight"].grad
        assert expected.abs().max() > 0
        assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max(), (path, part)


def test_a_fresh_adapter_changes_nothing_and_draws_as_peft_does():
    model = tiny_model()
    batch = PackedBatch.pack(SEQUENCES, "cpu")
    with torch.no_grad():
        base = model(batch)
        adapter = attach(model, CONFIG, "a")
        assert torch.equal(model(batch.with_adapter("a")), base)
    a = torch.cat([pair.lora_A.detach().flatten() * pair.lora_A.shape[1] ** 0.5 for pair in adapter.pairs.values()])
    assert a.abs().max() <= 1 and abs(a.std() - 3**-0.5) < 0.01  # uniform within ±1/sqrt(in)


def test_each_segment_sees_its_own_adapter(backend):
    model = tiny_model()
    randomised(attach(model, CONFIG, "a"), seed=1)
    randomised(attach(model, LoRAConfig(r=2, alpha=4, target_modules=("q_proj", "down_proj")), "b"), seed=2)
    sequences = [[*range(5, 25)], [*range(90, 70, -1)], [3, 4], [*range(10)]]
    names = ["a", "b", None, "a"]
    batch = PackedBatch.pack(sequences, "cpu")
    ends = torch.tensor(batch.seqlens).cumsum(0).tolist()
    segments = zip(names, [0, *ends[:-1]], ends, strict=True)
    batch = replace(batch, adapters=tuple(segment for segment in segments if segment[0]))
    with torch.inference_mode():
        together = model(batch).split(batch.seqlens)
        for ids, name, hidden in zip(sequences, names, together, strict=True):
            alone = model(PackedBatch.pack([ids], "cpu", name))
            assert torch.allclose(hidden, alone, atol=1e-5)
        assert not torch.allclose(together[0], model(PackedBatch.pack([sequences[0]], "cpu")), atol=1e-2)


def test_training_and_sampling_see_the_same_adapter():
    model = tiny_model()
    randomised(attach(model, CONFIG, "a"))
    batch = PackedBatch.pack(SEQUENCES, "cpu", "a")
    with torch.no_grad():
        sampled = model(batch)
    assert torch.allclose(model(batch), sampled, atol=1e-5)


def test_detach_leaves_the_base_as_it_was():
    model = tiny_model()
    batch = PackedBatch.pack(SEQUENCES, "cpu")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        base = model(batch)
        randomised(attach(model, CONFIG, "a"))
        randomised(attach(model, CONFIG, "b"), seed=1)
        detach(model, "a")
        assert list(model.adapters) == ["b"]
        detach(model, "b")
        assert torch.equal(model(batch), base)
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_only_the_adapter_is_trainable():
    model = tiny_model()
    adapter = attach(model, CONFIG, "a")
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()} and len(trainable) == 2 * 7 * 3


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_step_is_seen_at_once(foreach):
    """The version grows and the compute-dtype copies are remade: what is sampled next is the trained adapter."""
    model = tiny_model()
    adapter = randomised(attach(model, CONFIG, "a"))
    batch = PackedBatch.pack(SEQUENCES, "cpu", "a")
    with torch.no_grad():
        before, version = model(batch), adapter.version
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, foreach=foreach)
    gradients(model, adapter)
    optimizer.step()
    with torch.no_grad():
        after = model(batch)
    assert adapter.version > version
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, model(batch), atol=1e-5)  # the training path reads A and B themselves


def test_checkpointing_repeats_the_dropout():
    model = tiny_model()
    adapter = randomised(attach(model, LoRAConfig(r=4, alpha=8, dropout=0.3), "a"))
    tokens = torch.arange(sum(map(len, SEQUENCES)))
    adapter.set_dropout(5, tokens)
    kept = gradients(model, adapter)
    model.gradient_checkpointing = True
    recomputed = gradients(model, adapter)
    assert all(torch.equal(kept[key], recomputed[key]) for key in kept)
    for key, named in ((6, tokens), (5, tokens + (1 << 32))):
        adapter.set_dropout(key, named)
        other = gradients(model, adapter)
        assert not any(torch.equal(kept[key], other[key]) for key in kept)
    adapter.clear_dropout()
    assert not torch.equal(gradients(model, adapter)[next(iter(kept))], kept[next(iter(kept))])


def test_dropout_keys_of_layers_and_steps_never_meet():
    model = tiny_model()
    adapter = attach(model, CONFIG, "a")
    keys = set()
    for step in range(50):
        adapter.set_dropout(step, torch.arange(3))
        keys |= {pair.dropout.key for pair in adapter.pairs.values()}
    assert len(keys) == 50 * len(adapter.pairs)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_peft_loads_ours(tmp_path):
    model = tiny_model()
    twin = transformers_twin(model, tmp_path / "base")
    adapter = randomised(attach(model, CONFIG, "a"))
    save_adapter(adapter, tmp_path / "adapter", "some/model")
    theirs = PeftModel.from_pretrained(twin, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        hidden = model(PackedBatch.pack(SEQUENCES, "cpu", "a"))
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    assert torch.allclose(model.logits(hidden), expected, atol=1e-4)
    assert not list(tmp_path.glob("adapter/*.tmp"))


def test_ours_loads_pefts(tmp_path):
    model = tiny_model("qwen2_mha")
    twin = transformers_twin(model, tmp_path / "base", "qwen2_mha")
    theirs = get_peft_model(twin, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"])).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(model, tmp_path / "adapter", "p")
    assert adapter.config == LoRAConfig(r=3, alpha=5, dropout=0.0, target_modules=("q_proj", "up_proj"))
    with torch.no_grad():
        hidden = model(PackedBatch.pack(SEQUENCES, "cpu", "p"))
        expected = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    assert torch.allclose(model.logits(hidden), expected, atol=1e-4)


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path):
    model = tiny_model()
    adapter = randomised(attach(model, CONFIG, "a"))
    save_adapter(adapter, tmp_path, "some/model")
    again = load_adapter(model, tmp_path, "b")
    ours, theirs = adapter_tensors(adapter), adapter_tensors(again)
    assert again.config == adapter.config and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == ours.keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "is not an adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not an adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is not an adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"junk"), "is not an adapter"),
        (lambda folder: edit(folder, use_dora=True), "use_dora"),
        (lambda folder: edit(folder, use_rslora=True), "use_rslora"),
        (lambda folder: edit(folder, r=2), "does not fit"),
        (lambda folder: edit(folder, r=None), "adapter_config.json"),
    ],
)
def test_a_bad_adapter_is_named_and_leaves_nothing_behind(damage, message, tmp_path):
    model = tiny_model()
    save_adapter(attach(model, CONFIG, "good"), tmp_path, "some/model")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path, "bad")
    assert list(model.adapters) == ["good"]
    assert all(list(m.lora) == ["good"] for m in model.modules() if getattr(m, "lora", None))


def test_an_adapter_of_another_model_does_not_fit(tmp_path):
    save_adapter(attach(tiny_model(), CONFIG, "a"), tmp_path, "some/model")
    for changes in ({"num_hidden_layers": 2}, {"hidden_size": 96}):
        with pytest.raises(UserError, match="does not fit this model"):
            load_adapter(tiny_model(**changes), tmp_path, "a")


def test_bad_names_and_targets():
    model = tiny_model()
    attach(model, CONFIG, "a")
    for name in ("a", "x.y"):
        with pytest.raises(UserError, match=f'"{name}"'):
            attach(model, CONFIG, name)
    with pytest.raises(UserError, match=r"c_attn.*q_proj"):
        attach(model, LoRAConfig(target_modules=("c_attn",)), "b")


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def test_stacked_adapters_equal_merged_ones_in_float64():
    """Loss, gradients and three AdamW steps on top of an adapter equal those on weights it was merged into."""
    model, merged = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    before = randomised(attach(model, CONFIG, "one", 1))
    for path, pair in before.pairs.items():
        weight = merged.get_submodule(path).weight
        weight.data += CONFIG.scaling * pair.lora_B.double() @ pair.lora_A.double()
    kept = {path: (pair.lora_A.clone(), pair.lora_B.clone()) for path, pair in before.pairs.items()}
    stacked, fresh = attach_onto(model, "one", CONFIG, "two", 2), attach(merged, CONFIG, "two", 2)
    assert (stacked.config.r, stacked.config.scaling) == (2 * CONFIG.r, CONFIG.scaling)
    for path, pair in fresh.pairs.items():
        pair.lora_A.data.copy_(stacked.pairs[path].lora_A[CONFIG.r :])
    optimizers = [torch.optim.AdamW(a.parameters(), lr=1e-2, weight_decay=0.0) for a in (stacked, fresh)]
    for _ in range(3):
        losses = [nll(m, SEQUENCES, "two") for m in (model, merged)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for path, pair in stacked.pairs.items():
        n, twin = CONFIG.r, fresh.pairs[path]
        assert torch.equal(pair.lora_A[:n], kept[path][0]) and torch.equal(pair.lora_B[:, :n], kept[path][1])
        assert torch.allclose(pair.lora_A[n:], twin.lora_A, atol=1e-6) and twin.lora_B.abs().max() > 1e-3
        assert torch.allclose(pair.lora_B[:, n:], twin.lora_B, atol=1e-6)
    with torch.no_grad():
        a, b = (m(PackedBatch.pack(SEQUENCES, "cpu", "two")) for m in (model, merged))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
