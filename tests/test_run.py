"""The command: a run killed at any moment ends in the same bytes, and every mistake ends in one sentence."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from isheep import config, run
from isheep.config import UserError
from tests.parrot import NUM_EXAMPLES, write_parrot
from tests.scripted import seed_rows
from tools.kill_demo import digests, kill_and_compare

CONFIG = f"""
dtype = "float32"
iterations = 2
[sampler]
max_num_seqs = 8
kv_cache_gib = 0.1
[instruct]
data_size = 16
num_in_context = {NUM_EXAMPLES}
max_tokens = 150
max_prompts = 12
[answer]
max_tokens = 40
[assess]
max_tokens = 8
[measure]
batch_tokens = 512
[train]
r = 2
batch_size = 2
warmup_steps = 2
learning_rate = 1e-4
eval_steps = 3
checkpoint_steps = 2
"""
# One thread: processes of a test machine's neighbours make two spin against each other.
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, a configuration and seed tasks."""
    folder = tmp_path_factory.mktemp("given")
    write_parrot(folder / "parrot")
    (folder / "tiny.toml").write_text(CONFIG)
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seed_rows()))
    return folder


def words(given: Path, *more: object) -> list[str]:
    """The command's words after the module's name."""
    flags = ["--model", given / "parrot", "--config", given / "tiny.toml", "--seeds", given / "seeds.jsonl"]
    return [str(word) for word in (*flags, *more)]


def command(given: Path, *more: object) -> list[str]:
    return [sys.executable, "-m", "isheep.run", *words(given, *more)]


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one iteration that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(given, "--out", out, "--iterations", 1), env=ENV, check=True, capture_output=True)
    return out


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The command in this process; a user's mistake is raised."""
    monkeypatch.setattr(sys, "argv", ["isheep.run", *map(str, arguments)])
    run.main()


def test_killed_at_ten_random_moments_it_ends_in_the_same_bytes(given: Path, tmp_path: Path) -> None:
    outcome = kill_and_compare(command(given), tmp_path, num_kills=10, seed=0, env=ENV)
    assert outcome.differing == []
    assert outcome.num_kills == 10 and outcome.num_files == 2 * 21


def test_ctrl_c_ends_with_130_and_the_same_command_resumes(given: Path, whole: Path, tmp_path: Path) -> None:
    line = command(given, "--out", tmp_path / "run", "--iterations", 1)
    process = subprocess.Popen(line, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    answers = tmp_path / "run/iter1/answers.jsonl.part"
    while process.poll() is None and not answers.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "the same command resumes" in err and "Traceback" not in err
    assert '"stage stopped"' in (tmp_path / "run/events.jsonl").read_text()
    subprocess.run(line, env=ENV, check=True, capture_output=True)
    assert digests(tmp_path / "run") == digests(whole)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(given: Path, whole: Path, tmp_path: Path) -> None:
    def limit() -> None:  # a file beyond this size fails to be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    line = command(given, "--out", tmp_path / "run", "--iterations", 1)
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "no space left to write" in done.stderr and "Traceback" not in done.stderr
    subprocess.run(line, env=ENV, check=True, capture_output=True)
    assert digests(tmp_path / "run") == digests(whole)


def test_the_folder_says_what_was_run_on_what(whole: Path) -> None:
    env = json.loads((whole / "env.json").read_text())
    assert env["versions"]["torch"] and env["device"] == "cpu" and env["num_threads"] == 1 and env["backend"]
    assert 'template = "chatml"' in (whole / "config.toml").read_text()
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "run started" and events[-1]["event"] == "run finished"
    finished = {row["stage"]: row for row in events if row["event"] == "stage finished"}
    assert list(finished) == ["instruct", "answer", "assess", "measure", "select", "train", "show"]
    assert finished["instruct"]["counts"]["kept"] == 16 and finished["instruct"]["num_decode_tokens"] > 0
    summary = (whole / "summary.md").read_text()
    assert "instruct: kept" in summary and "**base**:" in summary and "**iter1**:" in summary


def test_zero_survivors_end_with_2_the_reasons_and_a_way_out(given: Path, tmp_path: Path) -> None:
    line = command(given, "--out", tmp_path / "run", "--set", "select.threshold=9.9", "--set", "assess.temperature=0")
    done = subprocess.run(line, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2
    for part in ("iter1: none of", "by select low_quality", "lower select.threshold", "stays in"):
        assert part in done.stderr
    assert (tmp_path / "run/iter1/selected.jsonl.seal").exists()


def test_too_many_clusters_are_mended_and_the_run_goes_on(given: Path, tmp_path: Path) -> None:
    out, few = tmp_path / "run", ("--iterations", 1, "--set", "instruct.max_prompts=3")

    def start_with(num_clusters: object) -> subprocess.CompletedProcess[str]:
        density = ("--set", "select.method=density", "--set", f"select.num_clusters={num_clusters}")
        return subprocess.run(command(given, "--out", out, *few, *density), env=ENV, capture_output=True, text=True)

    done = start_with(16)
    sentence = re.search(r"iter1: (\d+) pairs cannot fill select\.num_clusters = 16: give at most \1", done.stderr)
    assert done.returncode == 2 and sentence and "Traceback" not in done.stderr
    before = {name: digest for name, digest in digests(out).items() if name != "config.toml"}
    config = out / "config.toml"
    config.write_text(config.read_text().replace("num_clusters = 16", f"num_clusters = {sentence[1]}"))
    done = start_with(sentence[1])
    assert done.returncode == 0, done.stderr
    after = digests(out)
    assert {name: after[name] for name in before} == before
    assert len(json.loads((out / "iter1/dataset.json").read_text())) == int(sentence[1])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--set", "select.threshold=5"], r"select\.threshold = 8\.0 there, 5\.0 now"),
        (["--seed", "3"], "seed = 0 there, 3 now"),
        (["--set", "assess.level=quality"], r"assess\.level = both there, quality now"),
        (["--set", "assess.level=none", "--set", "select.threshold=0"], r"assess\.level = both there, none now"),
        (["--setting", "one_base", "--set", "train.learning_rate=1e-3"], r"train\.learning_rate"),
    ],
)
def test_a_folder_of_another_configuration_is_refused_by_key(
    given: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str
) -> None:
    before = digests(whole)
    with pytest.raises(UserError, match=sentence):
        start(monkeypatch, *words(given, "--out", whole, "--iterations", 1, *flags))
    assert digests(whole) == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "smollm-135m"], 'Did you mean "smollm2-135m"'),
        (["--set", "instruct.datasize=5"], r"Did you mean instruct\.data_size"),
        (["--set", "train.r=many"], "train.r must be a whole number"),
        (["--setting", "one_bass"], "one_base"),
        (["--set", "select.method=pll"], "ppl"),
        (["--set", "select.method=ppl", "--set", "measure.enabled=false"], "needs perplexities"),
        (["--set", "select.method=density_ppl", "--set", "measure.enabled=false"], "needs vectors"),
        (["--set", "select.method=density"], r"data_size = 16 cannot fill select\.num_clusters = 3000"),
        (["--set", "assess.level=none"], "no score to test"),
        (["--set", "assess.prompt=icl", "--set", "assess.level=quality"], "a score of its own"),
        (["--baseline", "dromedari"], 'Did you mean "dromedary"'),
        (["--baseline", "dromedary_iter1", "--set", "select.threshold=0"], 'without that it is "self_instruct"'),
        (
            ["--baseline", "dromedary", "--set", "answer.verbose=true", "--setting", "direct"],
            'means setting = "one_base", not "direct"',
        ),
        (
            ["--set", "instruct.method=topics", "--set", "instruct.data_size=9999", "--set", "select.method=density"],
            r'instruct\.method = "topics", with 200 at most, cannot fill select\.num_clusters = 3000',
        ),
        (["--baseline", "dromedary", "--iterations", "2"], 'baseline = "dromedary" means iterations = 1, not 2'),
        (["--baseline", "dromedary", "--setting", "direct"], 'means setting = "one_base", not "direct"'),
        (["--baseline", "self_instruct", "--set", "select.threshold=2"], "threshold = 0, not 2"),
        (["--baseline", "dromedary", "--set", "answer.method=zero_shot"], "not .zero_shot"),
        (["--baseline", "self_instruct", "--set", "answer.method=instances"], "not .instances"),
        (["--set", "answer.verbose=true"], "verbose must be false unless answer.method"),
        (["--set", "instruct.num_generated=1"], "num_generated must be 0 unless"),
        (["--setting", "one_last", "--set", "train.weight_decay=0.1"], "weight_decay must be 0"),
        (["--set", "patience=1", "--set", "train.val_share=0"], "needs validation losses"),
        (["--set", "paper_joins=true", "--set", "template=alpaca"], 'which template = "alpaca" does not have'),
        (["--set", "measure.context=prompt", "--baseline", "dromedary"], "catches zero-shot answers"),
        (["--seeds", "nowhere.jsonl"], r"cannot read nowhere\.jsonl"),
        (["--config", "nowhere.toml"], r"cannot read the configuration nowhere\.toml"),
        (["--adapter", "x"], "starts from the base model"),
        (["--dtype", "float32", "--set", "iterations=0"], "iterations must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        start(monkeypatch, *words(given, "--out", tmp_path / "run", *flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another place"):
        start(monkeypatch, *words(given, "--out", tmp_path / "file" / "run"))


def test_the_folder_is_named_after_the_model_where_nothing_else_is_said(given: Path) -> None:
    assert run.resolve(run.parser().parse_args(["--model", "Qwen/Qwen1.5-7B"])).out == "runs/Qwen1.5-7B"
    (given / "out.toml").write_text('out = "elsewhere"')
    args = run.parser().parse_args(["--model", "m", "--config", str(given / "out.toml")])
    assert run.resolve(args).out == "elsewhere"


def test_flags_win_over_configurations_and_set_over_flags(given: Path) -> None:
    flags = ["--config", given / "tiny.toml", "--out", "x", "--seed", 5, "--dtype", "bfloat16", "--set", "seed=6"]
    cfg = run.resolve(run.parser().parse_args(words(given, *flags)))
    assert (cfg.seed, cfg.dtype, cfg.iterations, cfg.instruct.data_size) == (6, "bfloat16", 2, 16)


def test_on_gpus_the_mesh_follows_from_their_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def shape(model: str, num_gpus: int, *more: str) -> tuple[int | None, int | None]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        args = run.parser().parse_args(["--model", model, "--out", "x", *more])
        return run.mesh_shape(run.resolve(args), args)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(logging.getLogger("isheep"), "propagate", True)
    with caplog.at_level("INFO", "isheep"):
        assert shape("qwen1.5-72b", 8) == (8, 1)
    assert "--shard 8 --replicate 1" in caplog.text and "KV cache" in caplog.text
    assert shape("qwen1.5-1.8b", 4) == (1, 4)
    assert shape("qwen1.5-1.8b", 4, "--shard", "2") == (2, 2)
    assert shape("qwen1.5-1.8b", 4, "--device", "cuda:0") == (1, 1), "one device is one rank"
    with pytest.raises(UserError, match=r"qwen1\.5-72b does not fit on 1 GPU .* it fits on"):
        shape("qwen1.5-72b", 1)
    assert shape("qwen1.5-72b", 1, "--device", "cpu") == (None, None), "on a CPU the flags alone say"


def test_direct_is_one_iteration_on_all_data() -> None:
    def resolve(*more: str) -> tuple[int | None, int]:
        cfg = run.resolve(run.parser().parse_args(["--model", "qwen1.5-72b", "--setting", "direct", *more]))
        return cfg.iterations, cfg.instruct.data_size

    assert resolve() == (1, 20_000)
    assert resolve("--set", "instruct.data_size=30000") == (1, 30_000)
    with pytest.raises(UserError, match=r'setting = "direct" means iterations = 1, not 2: leave it at that'):
        resolve("--iterations", "2")


def test_a_baseline_brings_its_defaults_along_and_gives_way_to_what_is_said() -> None:
    def resolve(*more: str) -> config.RunConfig:
        return run.resolve(run.parser().parse_args(["--model", "qwen1.5-72b", *more]))

    for name in config.BASELINES:
        cfg = resolve("--baseline", name)
        assert (cfg.baseline, cfg.setting, cfg.iterations) == (name, "one_base", 1)
        assert bool(cfg.scores) == (name == "dromedary_iter1")
    cfg = resolve("--baseline", "dromedary", "--set", "train.r=4", "--set", "instruct.method=topics")
    assert (cfg.train.r, cfg.train.batch_size, cfg.instruct.method) == (4, 768, "topics")
    cfg = resolve("--set", "baseline=dromedary", "--set", "answer.verbose=true")
    assert (cfg.iterations, cfg.alarm.max_duplicates) == (2, 1.0)
    assert resolve("--baseline", "self_instruct", "--set", "assess.level=none").scores == ()


def test_a_flag_is_stronger_than_a_file_that_was_written_for_any_method(tmp_path: Path) -> None:
    def resolve(text: str, *more: str) -> config.RunConfig:
        (tmp_path / "any.toml").write_text(text)
        return run.resolve(run.parser().parse_args(["--model", "m", "--config", str(tmp_path / "any.toml"), *more]))

    cfg = resolve("iterations = 2\n[select]\nthreshold = 4\n[train]\nr = 3", "--baseline", "dromedary")
    assert (cfg.iterations, cfg.select.threshold, cfg.train.r) == (1, 0, 3)
    assert resolve("iterations = 2", "--setting", "direct").iterations == 1
    with pytest.raises(UserError, match=r"means select\.threshold = 0, not 4"):
        resolve('baseline = "self_instruct"\n[select]\nthreshold = 4')


def test_a_cell_is_stronger_than_the_command_line_and_what_is_said_than_what_is_implied() -> None:
    args = run.parser().parse_args(["--model", "m", "--iterations", "2", "--set", "select.threshold=6"])
    cfg = run.resolve(args, {"train": {"batch_size": 16}}, ['baseline="dromedary"'])
    assert (cfg.iterations, cfg.select.threshold, cfg.train.batch_size, cfg.train.r) == (1, 0, 16, 16)


def test_self_instruct_of_2022_has_its_own_numbers() -> None:
    cfg = run.resolve(run.parser().parse_args(["--model", "m", "--baseline", "self_instruct_2022"]))
    assert (cfg.instruct.num_in_context, cfg.instruct.num_generated, cfg.instruct.max_tokens) == (8, 2, 1024)
    assert len(cfg.instruct.blacklist) == 13 and "music" not in cfg.instruct.blacklist
    assert (cfg.answer.method, cfg.select.threshold) == ("instances", 0)


@pytest.mark.parametrize(("model", "iterations"), [("qwen1.5-72b", 6), ("qwen1.5-7b", 3), ("some/model", 3)])
def test_the_number_of_iterations_is_the_papers(model: str, iterations: int) -> None:
    cfg = run.resolve(run.parser().parse_args(["--model", model, "--out", "x"]))
    assert cfg.iterations == iterations and cfg.dtype == "bfloat16" and cfg.seed == 0


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], "both scores above 8, rated by the current model"),
        (["assess.level=following", "select.threshold=6"], "following scores above 6"),
        (["assess.level=none", "select.threshold=0"], "every pair that passes the rules"),
        (["select.threshold=0"], "every pair that passes the rules"),
        (["select.threshold=-1"], "every answer"),
        (["select.method=ppl"], "both perplexities below 50"),
    ],
)
def test_the_plan_says_which_pairs_are_kept(overrides: list[str], passes: str) -> None:
    flags = [word for text in overrides for word in ("--set", text)]
    assert run._kept(run.resolve(run.parser().parse_args(["--model", "m", *flags]))).startswith(passes)
