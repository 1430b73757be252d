"""One copy of the weights, two views: several gloo ranks against the single process, in float32."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isheep import score
from isheep.cli import obey, open_named
from isheep.config import SamplerConfig, TrainConfig
from isheep.mesh import ALONE, Mesh
from isheep.model import parallel
from isheep.model.batch import PackedBatch
from isheep.model.lora import LoRAConfig, attach, load_adapter
from isheep.model.transformer import Transformer
from isheep.model.weights import load_model
from isheep.sampler import team
from isheep.train import trainer
from isheep.train.data import Example
from tests.gloo import run_ranks
from tests.paging import paged_batch, scattered_blocks
from tests.sampler.test_engine import make_requests
from tests.tiny import tiny_model, transformers_twin, write_checkpoint
from tests.train.test_trainer import examples

PARTS = {"sample": team.follow, "score": score.follow, "train": trainer.follow}
LENS = (1, 5, 33, 20)
# what a mesh can meet: heads, key/value heads, inner units and tokens that divide by the ranks, or do not
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mha, biases": ("qwen2_mha", {}),
    "gqa, tied": ("qwen2_gqa_tied", {}),
    "out biases": ("llama_linear_rope_bias", {}),
    "qk norms": ("qwen3_head_dim", {}),
    "fewer kv heads than ranks": ("llama_gqa", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "one kv head, biases": ("qwen2_mha", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "nothing divides": ("llama_gqa", {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 81,
                                      "vocab_size": 321}),
}  # fmt: skip


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(320, (n,), generator=generator).tolist() for n in LENS]


def with_adapter(model: Transformer) -> Transformer:
    """An adapter that changes something from the start."""
    generator = torch.Generator().manual_seed(7)
    for pair in attach(model, LoRAConfig(4, 8.0, 0.0), "a", 3).pairs.values():
        pair.lora_B.data.normal_(0, 0.05, generator=generator)
    return model


def paged_logits(view: Transformer) -> torch.Tensor:
    """Prefill through the paged cache, seen through the adapter: [T, V] of the view's part of the vocabulary."""
    blocks = scattered_blocks(LENS, 16, 30)
    batch = paged_batch([(ids, 0) for ids in sequences()], blocks, 16).with_adapter("a")
    with torch.inference_mode():
        return view.logits(view(batch, view.new_kv_cache(30, 16)))


def loss_and_gradients(model: Transformer) -> tuple[float, list[torch.Tensor]]:
    model.gradient_checkpointing = True
    batch = PackedBatch.pack(sequences(), "cpu", "a")
    loss = model.nll(model(batch), batch.input_ids.roll(-1), 16).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.adapters["a"].parameters() if p.grad is not None]
    model.zero_grad()
    return loss.item(), gradients


def places(model: Transformer) -> dict[str, tuple[int, int]]:
    """Where every parameter's bytes lie on this rank, and how many they are."""
    held = {name: parallel.local(p) for name, p in model.named_parameters()}
    return {name: (p.data_ptr(), p.nbytes) for name, p in held.items()}


def both_views(mesh: Mesh, folder: Path) -> dict[str, Any]:
    model = with_adapter(load_model(folder, torch.float32, "cpu", mesh))
    before = places(model)
    first = paged_logits(parallel.sampling_view(model, mesh))
    loss, gradients = loss_and_gradients(model)
    again = paged_logits(parallel.sampling_view(model, mesh))
    held = sum(nbytes for name, (_, nbytes) in before.items() if ".lora." not in name)
    return {"logits": first, "again": again, "loss": loss, "gradients": gradients, "held": held,
            "stayed": places(model) == before}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_views_equal_the_single_process(tmp_path: Path, shape: str, ranks: int) -> None:
    name, changes = SHAPES[shape]
    whole = with_adapter(tiny_model(name, **changes))
    folder = write_checkpoint(tiny_model(name, **changes), tmp_path, name, **changes)
    expected = paged_logits(whole)
    loss, gradients = loss_and_gradients(whole)
    found = run_ranks(both_views, ranks, 1, folder)
    spread = expected.max() - expected.min()
    assert (torch.cat([rank["logits"] for rank in found], -1) - expected).abs().max() <= 1e-4 * spread
    for rank in found:
        assert rank["loss"] == pytest.approx(loss, rel=1e-6)
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(rank["gradients"], gradients, strict=True)
        )
        assert torch.equal(rank["logits"], rank["again"]), "the training view left the weights as they were"
        assert rank["stayed"], "a weight moved"


def test_a_rank_holds_its_part_and_reads_no_more(tmp_path: Path) -> None:
    """At a size where what is whole everywhere (norms) and headers are nothing beside the weights."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4,
             "vocab_size": 4096}  # fmt: skip
    model = tiny_model("llama_gqa", dtype=torch.bfloat16, **shape)
    size = sum(p.nbytes for p in model.parameters())
    folder = write_checkpoint(model, tmp_path, **shape)
    for dtype in (torch.bfloat16, torch.float32):  # read straight into place, and by way of a small buffer
        for held, read in run_ranks(load_and_count, 4, 1, folder, dtype):
            assert held == pytest.approx(size / 4 * dtype.itemsize / 2, rel=0.002)
            assert read == pytest.approx(size / 4, rel=0.01)


def load_and_count(mesh: Mesh, folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of weights that this rank holds, and bytes that the kernel read for it."""

    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])

    load_model(folder, dtype, "cpu", mesh)  # torch imports modules of its own the first time
    before = bytes_read()
    model = load_model(folder, dtype, "cpu", mesh)
    return sum(nbytes for _, nbytes in places(model).values()), bytes_read() - before


# ---- the whole circle: generate, score, train, generate ----------------------------------------------------------


SAMPLER = SamplerConfig(max_num_seqs=6, max_num_batched_tokens=64, kv_cache_gib=0.01)
TRAIN = TrainConfig(r=4, epochs=1.0, val_share=0.0, learning_rate=1e-2, warmup_steps=1, batch_size=5,
                    micro_batch_tokens=64, dropout=0.1, eval_steps=2)  # fmt: skip


def circle(mesh: Mesh, folder: Path, out: Path, rows: list[Example], val_rows: list[Example]) -> dict[str, Any]:
    """What the leader got; the followers' weights are where they were."""
    if not mesh.leads:
        obey(mesh, PARTS)
        return {}
    opened = open_named(str(folder), "float32", "cpu", template="raw", mesh=mesh)
    model, tokenizer = opened.model, opened.tokenizer
    adapter = attach(model, LoRAConfig(4, 8.0, 0.1), "a", 3)
    parallel.share_adapter(adapter, mesh)
    before = {name: place for name, place in places(model).items() if ".lora." not in name}
    requests = [
        replace(r, params=replace(r.params, max_tokens=min(r.params.max_tokens, 12)))
        for r in make_requests(24)
        if r.adapter is None
    ]
    sampler = team.start_sampler(model, tokenizer, SAMPLER, 5, (), mesh)
    found: dict[str, Any] = {"base": {(c.id, c.sample): c.token_ids for c in sampler.stream(requests)}}
    found["tokens"] = sampler.stats.num_decode_tokens
    sampler.close()
    texts = [{"instruction": "Say " + "so " * i, "input": "", "output": "yes " * (i % 5)} for i in range(11)]
    parts = list(score.score_rows(model, tokenizer, texts, "", None, True, 40, mesh=mesh))
    found["scores"] = [row for part in parts for row in part.scores]
    found["vectors"] = torch.cat([part.vectors for part in parts])
    trainer.train(model, adapter, rows, val_rows, TRAIN, out, 0, "tiny", mesh)
    found["log"] = (out / "train_log.jsonl").read_text()
    found["adapter"] = load_file(out / "adapter/adapter_model.safetensors")
    sampler = team.start_sampler(model, tokenizer, SAMPLER, 5, (), mesh)
    tuned = (replace(request, adapter="a") for request in requests)
    found["tuned"] = {(c.id, c.sample): c.token_ids for c in sampler.stream(tuned)}
    sampler.close()
    found["stayed"] = {name: place for name, place in places(model).items() if ".lora." not in name} == before
    mesh.command("end") if mesh.size > 1 else None
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Example], list[Example], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("circle")
    write_checkpoint(tiny_model("qwen2_gqa_tied"), folder / "model", "qwen2_gqa_tied")
    rows, val_rows = examples(23, longest=60), examples(5, seed=1)
    return folder, rows, val_rows, circle(ALONE, folder / "model", folder / "alone", rows, val_rows)


@pytest.mark.parametrize(("shard", "replicate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_whole_circle_equals_the_single_process(alone: Any, tmp_path: Path, shard: int, replicate: int) -> None:
    folder, rows, val_rows, expected = alone
    found = run_ranks(circle, shard, replicate, folder / "model", tmp_path, rows, val_rows)[0]
    assert found["base"] == expected["base"], "greedy and seeded generations, token for token"
    assert found["tokens"] == expected["tokens"] > 0
    assert found["scores"] == expected["scores"], "the same batches on the same gathered weights: the same digits"
    assert torch.equal(found["vectors"], expected["vectors"])
    assert_same_training(found, expected)
    assert found["tuned"] == expected["tuned"] != expected["base"]
    assert found["stayed"]


def test_an_adapter_trained_on_four_ranks_loads_on_one_and_in_peft(alone: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, rows, val_rows, _ = alone
    run_ranks(train_only, 4, 1, folder / "model", tmp_path / "run", rows, val_rows)
    model = tiny_model("qwen2_gqa_tied")
    adapter = load_adapter(model, tmp_path / "run/adapter", "a")
    assert max(pair.lora_B.abs().max().item() for pair in adapter.pairs.values()) > 1e-3
    twin = transformers_twin(tiny_model("qwen2_gqa_tied"), tmp_path / "twin", "qwen2_gqa_tied")
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "run/adapter").eval()
    ids = sequences()[2]
    with torch.no_grad():
        ours = model.logits(model(PackedBatch.pack([ids], "cpu", "a")))
        assert torch.allclose(ours, theirs(torch.tensor([ids])).logits[0], atol=1e-4)


def train_only(mesh: Mesh, folder: Path, out: Path, rows: list[Example], val_rows: list[Example]) -> None:
    if not mesh.leads:
        return obey(mesh, PARTS)
    model = open_named(str(folder), "float32", "cpu", template="raw", mesh=mesh).model
    adapter = attach(model, LoRAConfig(4, 8.0, 0.1), "a", 3)
    trainer.train(model, adapter, rows, val_rows, TRAIN, out, 0, "tiny", mesh)
    mesh.command("end")
    return None


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    logs = [[json.loads(line) for line in each["log"].splitlines()] for each in (found, expected)]
    assert len(logs[0]) >= 5
    for row, other in zip(*logs, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for key, tensor in expected["adapter"].items():
        assert torch.allclose(found["adapter"][key], tensor, rtol=1e-3, atol=1e-5), key


def test_fewer_rows_than_ranks(alone: Any, tmp_path: Path) -> None:
    """Two rows and one validation row on four ranks: some have nothing in every pass."""
    folder, rows, val_rows, _ = alone
    expected = circle(ALONE, folder / "model", tmp_path / "alone", rows[:2], val_rows[:1])
    found = run_ranks(circle, 4, 1, folder / "model", tmp_path / "four", rows[:2], val_rows[:1])[0]
    assert found["log"].count("\n") == 1
    for key, tensor in expected["adapter"].items():
        assert torch.allclose(found["adapter"][key], tensor, rtol=1e-3, atol=1e-5), key
