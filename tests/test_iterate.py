"""The loop on a real engine and a tiny model: who samples, what is trained, what stays where it is."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isheep import config, session
from isheep.cli import open_named
from isheep.config import RunConfig, load_config
from isheep.iterate import SETTINGS, iterate
from isheep.model.transformer import Transformer
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Request, SamplingParams
from isheep.session import Session
from isheep.stages import kept, read_sealed
from tests.parrot import NUM_EXAMPLES, write_parrot
from tests.scripted import seed_rows
from tools.kill_demo import digests

SMALL = {
    "iterations": 2,
    "dtype": "float32",
    "sampler": {"max_num_seqs": 8, "kv_cache_gib": 0.1},
    "instruct": {"data_size": 8, "num_in_context": NUM_EXAMPLES, "max_tokens": 150, "max_prompts": 8},
    "answer": {"max_tokens": 30},
    "assess": {"max_tokens": 8},
    "train": {"r": 2, "batch_size": 4, "warmup_steps": 1, "epochs": 1.0},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_parrot(folder / "parrot")
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seed_rows()))
    return folder


@pytest.fixture
def make(given: Path, tmp_path: Path) -> Callable[..., Session]:
    """A session in a folder of this test, on a model of its own."""

    def session_of(**changes: object) -> Session:
        cfg = load_config(RunConfig, SMALL, {"model": str(given / "parrot"), "out": str(tmp_path / "run"), **changes})
        (tmp_path / "run").mkdir(exist_ok=True)
        return Session(cfg, open_named(cfg.model, cfg.dtype, "cpu"), given / "seeds.jsonl")

    return session_of


def weights_of(model: Transformer) -> dict[str, tuple[int, str]]:
    """Where each base weight is, and a digest of what is there."""
    base = {name: p for name, p in model.named_parameters() if ".lora." not in name}
    return {name: (p.data_ptr(), hashlib.sha256(p.numpy()).hexdigest()) for name, p in base.items()}


def test_each_iteration_is_sampled_by_the_adapter_trained_before(
    make: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = make(), []
    stream = Sampler.stream

    def watched(self: Sampler, requests: object):  # type: ignore[no-untyped-def]
        def note():  # type: ignore[no-untyped-def]
            for request in requests:  # type: ignore[attr-defined]
                seen.append(request)
                yield request

        return stream(self, note())

    monkeypatch.setattr(Sampler, "stream", watched)
    before = weights_of(run.model)
    iterate(run)
    assert weights_of(run.model) == before  # not a byte was moved or changed
    assert set(run.model.adapters) == {"iter1", "iter2"}
    assert not torch.equal(*(next(iter(run.model.adapters[name].parameters())) for name in ("iter1", "iter2")))

    def adapters(start: str) -> set[str | None]:
        return {request.adapter for request in seen if request.id.startswith(start)}

    assert adapters("iter1/instruct/") == {None} and adapters("iter2/instruct/") == {"iter1"}
    assert {r.adapter for r in seen if r.id.endswith("/answer") and r.id.startswith("iter2")} == {"iter1"}
    assert {r.adapter for r in seen if r.id.endswith("/quality") and r.id.startswith("iter2")} == {"iter1"}
    assert adapters("iter1/show/base") == {None} and adapters("iter2/show/") == {"iter2"}


def test_one_base_starts_each_training_from_the_base_model(make: Callable[..., Session]) -> None:
    run = make()
    iterate(run)
    for t in (1, 2):
        log = read_sealed(run.out / f"iter{t}/train_log.jsonl")
        summary = json.loads((run.out / f"iter{t}/train_summary.json").read_bytes())
        kept = json.loads((run.out / f"iter{t}/dataset.json").read_bytes())
        assert summary["num_rows"] + summary["num_val_rows"] == len(kept) > 0 and log[0]["step"] == 1
    assert (
        json.loads((run.out / "iter1/train_summary.json").read_bytes())["made_from"]["initial_adapter"]
        != (json.loads((run.out / "iter2/train_summary.json").read_bytes())["made_from"]["initial_adapter"])
    )


def num_trained(folder: Path) -> int:
    summary = json.loads((folder / "train_summary.json").read_bytes())
    return summary["num_rows"] + summary["num_val_rows"]


def test_one_last_trains_on_top_of_the_last_adapter_and_leaves_it_as_it_is(make: Callable[..., Session]) -> None:
    run = make(setting="one_last")
    iterate(run)
    first, second = (run.model.adapters[name] for name in ("iter1", "iter2"))
    assert (first.config.r, second.config.r) == (2, 4)
    for path, pair in second.pairs.items():
        assert torch.equal(pair.lora_A[:2], first.pairs[path].lora_A)
        assert torch.equal(pair.lora_B[:, :2], first.pairs[path].lora_B)
    assert any(pair.lora_B[:, 2:].abs().max() > 0 for pair in second.pairs.values())
    assert json.loads((run.out / "iter2/adapter/adapter_config.json").read_bytes())["r"] == 4
    assert num_trained(run.out / "iter2") == len(json.loads((run.out / "iter2/dataset.json").read_bytes()))


def test_total_base_trains_on_the_data_of_all_iterations(make: Callable[..., Session]) -> None:
    run = make(setting="total_base")
    iterate(run)
    sizes = [len(json.loads((run.out / f"iter{t}/dataset.json").read_bytes())) for t in (1, 2)]
    assert [num_trained(run.out / f"iter{t}") for t in (1, 2)] == [sizes[0], sum(sizes)]
    assert {run.model.adapters[name].config.r for name in ("iter1", "iter2")} == {2}


def test_a_finished_run_does_nothing_and_more_iterations_prolong_it(
    make: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate(make(iterations=1))
    first = make(iterations=1)
    before = digests(first.out)
    with monkeypatch.context() as patch:
        patch.setattr(session, "start_sampler", None)  # nothing may be sampled
        iterate(first)
    assert digests(first.out) == before
    longer = make(iterations=2)
    iterate(longer)
    after = digests(longer.out)
    assert {name: after[name] for name in before} == before
    whole = make(out=str(longer.out.with_name("whole")))
    whole.out.mkdir()
    iterate(whole)
    assert digests(whole.out) == after


def test_perplexity_selects_without_assessment(make: Callable[..., Session]) -> None:
    run = make(iterations=1, select={"method": "ppl", "max_ppl": 1e9})
    iterate(run)
    assert not (run.out / "iter1/replies.jsonl").exists()
    assert {row["quality_score"] for row in json.loads((run.out / "iter1/dataset.json").read_bytes())} == {None}


@pytest.mark.parametrize(
    ("assess", "threshold"),
    [("none", 0), ("both", 0), ("both", -1), ("quality", 8), ("following", 8), ("icl", 8)],
)
def test_each_level_runs(make: Callable[..., Session], assess: str, threshold: int) -> None:
    chosen = {"prompt": "icl"} if assess == "icl" else {"level": assess}
    run = make(iterations=1, assess={"max_tokens": 8, **chosen}, select={"threshold": threshold})
    iterate(run)
    folder = run.out / "iter1"
    answers, kept_rows = read_sealed(folder / "answers.jsonl"), json.loads((folder / "dataset.json").read_bytes())
    assert (folder / "scores.jsonl").exists() == (threshold > 0)
    if threshold == 0:
        assert len(kept_rows) == len(kept(answers))
    elif threshold == -1:
        assert len(kept_rows) == len([row for row in answers if row["reason"] != "exceeds_context"])
    else:
        columns = [name for name in ("quality_score", "following_score") if assess in (name.partition("_")[0], "icl")]
        assert all(row[name] > 8 for row in kept_rows for name in columns) and columns
        passed = [row for row in read_sealed(folder / "scores.jsonl") if (row[columns[0]] or 0) > 8]
        assert len(passed) == len(kept_rows) > 0


@pytest.mark.parametrize("method", ["density", "density_ppl"])
def test_density_selects_one_pair_of_each_cluster_without_assessment(make: Callable[..., Session], method: str) -> None:
    changes = {"iterations": 2, "select": {"method": method, "num_clusters": 4}, "measure": {"pooling": "last"}}
    run = make(**changes)
    iterate(run)
    for t in (1, 2):
        rows = [row for row in read_sealed(run.out / f"iter{t}/selected.jsonl") if row["stage"] == "select"]
        kept = [row["cluster"] for row in rows if row["verdict"] == "kept"]
        assert sorted(kept) == sorted({row["cluster"] for row in rows}) and len(kept) == 4 < len(rows)
        assert not (run.out / f"iter{t}/replies.jsonl").exists()
    before = digests(run.out)
    iterate(make(**changes))
    assert digests(run.out) == before


def test_peft_loads_what_the_loop_trained(make: Callable[..., Session], given: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    run = make(iterations=1)
    iterate(run)
    base = transformers.AutoModelForCausalLM.from_pretrained(given / "parrot", dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, run.out / "iter1/adapter").eval()
    ids = run.tokenizer.encode(run.template.prompt("amber3 basin3."))
    with torch.no_grad():
        theirs = tuned(torch.tensor([ids])).logits[0, -1].argmax().item()
    (ours,) = run.stream([greedy(ids)])
    assert ours.token_ids == [theirs]


def greedy(ids: list[int]) -> Request:
    return Request("x", tuple(ids), SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), "iter1")


def test_the_table_of_settings_is_the_one_that_configurations_choose_from() -> None:
    assert tuple(SETTINGS) == config.SETTINGS
    for name in SETTINGS:
        assert replace(RunConfig(model="m", out="o"), setting=name).setting == name
