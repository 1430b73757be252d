"""Grids of runs: what cells share is computed once, each ends as if it had run alone, and a failure stops no other."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import pytest

from isheep import run
from isheep.artifacts import Journal
from isheep.config import UserError, data_path
from isheep.grid import report
from isheep.recipes import SCALED, Job, get, jobs, load_recipe, plan_lines, scaled
from isheep.sampler.engine import Sampler
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.sampler.store import Store
from isheep.stages import seal_at_once
from isheep.train.trainer import Trainer
from tests.scripted import ScriptedSampler
from tests.test_run import ENV, given, start, whole, words  # noqa: F401  (given and whole are fixtures)
from tools.kill_demo import digests

RECIPES = sorted(data_path("configs", "recipes").glob("*.toml"))
# Above 9.9 a single row is left, which is too few here.
THRESHOLDS = """
[base]
alarm = { on_alarm = "stop", min_survivors = 5, max_full_marks = 1.0, max_loss_ratio = 1e9 }
[grid]
select.threshold = [9.9, -1, 0, 2, 8]
"""
SETTINGS = """
[cells]
one_base = { setting = "one_base" }
one_last = { setting = "one_last" }
total_base = { setting = "total_base" }
direct = { setting = "direct", iterations = 1, instruct = { data_size = 20 } }
"""


def write_recipe(folder: Path, body: str, name: str = "try") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(f'title = "A try"\nsource = "nowhere"\n{body}')
    return path


class Counts:
    """How often each request was sampled, and how many optimizer steps each adapter's name was trained for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        stream, step = Sampler.stream, Trainer.step

        def counted(sampler: Sampler, requests: Iterable[Request]) -> Iterator[Completion]:
            def note() -> Iterator[Request]:
                for request in requests:
                    self.requests[request.id] += 1
                    yield request

            return stream(sampler, note())

        def counted_step(trainer: Trainer, *args: object) -> object:
            self.steps[trainer.adapter.name] += 1
            return step(trainer, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Sampler, "stream", counted)
        monkeypatch.setattr(Trainer, "step", counted_step)

    def of(self, stage: str) -> Counter[str]:
        return Counter({key: n for key, n in self.requests.items() if f"/{stage}" in key})


def num_steps(folder: Path) -> int:
    return json.loads((folder / "train_summary.json").read_bytes())["num_steps"]


def grid_start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["isheep.run", *map(str, arguments)])
    return run.main()


def test_the_settings_run_the_first_iteration_once(
    given: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, grid = Counts(monkeypatch), tmp_path / "grid"
    recipe = write_recipe(tmp_path, SETTINGS)
    assert grid_start(monkeypatch, *words(given, "--recipe", recipe, "--out", grid)) == 0
    first = {key: n for key, n in counts.requests.items() if key.startswith("iter1/") and "/show/" not in key}
    assert set(first.values()) == {1} and len(counts.of("quality")) > 16  # direct asks for more, not again
    # three settings train the first iteration once, direct its own
    assert counts.steps["iter1"] == sum(num_steps(grid / name / "iter1") for name in ("one_base", "direct"))
    assert counts.requests["iter1/show/base/0"] == 1
    for name in ("one_last", "total_base"):
        shared = digests(grid / "one_base").items() & digests(grid / name).items()
        assert len([path for path, _ in shared if path.startswith("iter1/")]) == 21
    start(monkeypatch, *words(given, "--out", tmp_path / "alone", "--setting", "one_last"))
    assert digests(grid / "one_last") == digests(tmp_path / "alone")
    results = json.loads((grid / "results.json").read_bytes())
    assert [len(each["iterations"]) for each in results.values()] == [2, 2, 2, 1]


def test_thresholds_generate_answer_and_rate_once_and_one_that_fails_stops_no_other(
    given: Path,  # noqa: F811
    whole: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts, grid = Counts(monkeypatch), tmp_path / "grid"
    line = words(given, "--recipe", write_recipe(tmp_path, THRESHOLDS), "--out", grid, "--iterations", 1)
    assert grid_start(monkeypatch, *line) == 0
    for stage in ("instruct/", "answer", "quality", "following"):
        assert set(counts.of(stage).values()) == {1}, stage
    results = json.loads((grid / "results.json").read_bytes())
    assert [each["status"] for each in results.values()] == ["failed"] + ["finished"] * 4
    assert results["threshold=9.9"]["reason"].startswith("iter1: only 1 rows are left to train on")
    assert digests(grid / "threshold=8") == digests(whole)
    shown = capsys.readouterr().out
    assert "threshold=9.9 failed: iter1: only 1 rows" in shown and "| threshold=9.9 | 1    | failed" in shown
    before, counts.requests = {name: digests(grid / name) for name in results}, Counter()
    assert grid_start(monkeypatch, *line) == 0  # again: nothing is sampled, and what failed fails
    assert not counts.requests
    assert {name: digests(grid / name) for name in results} == before


def test_a_killed_grid_goes_on(given: Path, whole: Path, tmp_path: Path) -> None:  # noqa: F811
    grid, recipe = tmp_path / "grid", write_recipe(tmp_path, "[grid]\nselect.threshold = [2, 8]\n")
    flags = words(given, "--recipe", recipe, "--out", grid, "--iterations", 1)
    line = [sys.executable, "-m", "isheep.run", *flags]
    for awaited in ("threshold=2/iter1/answers.jsonl.part", "threshold=8/iter1/train_log.jsonl"):
        process = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (grid / awaited).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(line, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(grid / "threshold=8") == digests(whole)


def test_a_grid_on_two_ranks(given: Path, whole: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = write_recipe(tmp_path, THRESHOLDS)
    flags = words(given, "--recipe", recipe, "--out", tmp_path / "grid", "--iterations", 1, "--shard", 2)
    done = subprocess.run([sys.executable, "-m", "isheep.run", *flags], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "grid/results.json").read_bytes())
    assert [each["status"] for each in results.values()] == ["failed"] + ["finished"] * 4
    for name in ("dataset.json", "replies.jsonl"):
        assert (tmp_path / "grid/threshold=8/iter1" / name).read_bytes() == (whole / "iter1" / name).read_bytes()


def test_a_grid_of_failures_ends_with_2(
    given: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path, "[grid]\nselect.threshold = [9.8, 9.9]\n")
    flags = ("--recipe", recipe, "--out", tmp_path / "grid", "--set", "instruct.max_prompts=2")
    assert grid_start(monkeypatch, *words(given, *flags)) == 2


def dry_run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(run, "open_named", None)  # nothing may be loaded
    assert grid_start(monkeypatch, "--dry-run", *arguments) == 0


def test_a_dry_run_shows_what_is_shared_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dry_run(monkeypatch, "--recipe", "iterative", "--model", "qwen1.5-72b", "--scale", "0.01")
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines if line.startswith("|")}
    assert [rows["one_last", t].count("as one_base") for t in "123"] == [5, 4, 0]  # the second trains another
    assert rows["direct-20k", "1"].count("rest as one_base") == 3
    assert "scaled by 0.01, one_base, one_last, total_base: instruct.data_size 100" in "\n".join(lines)
    assert any("tokens at most" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_settings_exist(path: Path) -> None:
    recipe = load_recipe(path.stem)
    args = run.parser().parse_args(["--model", "qwen1.5-72b"])
    cells = {name: run.resolve(args, recipe.base, texts) for name, texts in recipe.overrides().items()}
    assert len({str(cfg) for cfg in cells.values()}) == len(cells)
    assert len(plan_lines(cells)) > len(cells)
    for cfg in cells.values():
        scaled(cfg, 0.01)
    for figures in (recipe.figures(each["model"]) for each in recipe.published):
        for each in figures:
            assert len({len(line) for line in each.lines}) == 1 and len(each.lines) > 1
            assert bool(each.notes) == ("?" in each.table)  # a doubt has its reason
            if each.is_by_cell:
                assert {line[0] for line in each.lines[1:]} <= {*cells, "base"}


def test_there_is_a_recipe_for_each_table_and_figure() -> None:
    names = {path.stem for path in RECIPES}
    tables = {"main", "iterative", "filters", "levels", "prompts", "threshold", "data_size", "llama3", "baselines"}
    assert names == tables


def test_published_figures_stand_beside_ours() -> None:
    found = {"iter": 2, "pairs": 9000, "unread": 5, "survivors": 3102, "median_words": 27}
    found |= {"final_loss": 1.25, "best_val_loss": None}
    outcomes = {"one_base": {"status": "finished", "reason": None, "iterations": [found]}}
    lines = report(load_recipe("iterative"), "qwen1.5-72b", outcomes).splitlines()
    row = next(line for line in lines if line.startswith("| one_base") and "3102" in line)
    assert [cell.strip() for cell in row.split("|")][3:11] == ["9000", "5", "3102", "27", "1.2500", "", "9.06", "7.90"]
    assert any(line.startswith("| direct-20k") and "39.37" in line for line in lines)


def test_scale_multiplies_sizes_and_nothing_else() -> None:
    cfg = run.resolve(run.parser().parse_args(["--model", "qwen1.5-72b"]))
    small = scaled(cfg, 0.001)
    assert [get(small, key) for key in SCALED] == [10, None, 3, 3, 0, 1, 0]
    assert small.answer == cfg.answer and small.iterations == cfg.iterations
    for scale in (0, 2):
        with pytest.raises(UserError, match="--scale must be"):
            scaled(cfg, scale)


def test_jobs_of_later_iterations_share_only_what_led_there() -> None:
    parse = run.parser().parse_args
    one, other = (
        {(job.iteration, job.stage): job.key for job in jobs(run.resolve(parse(["--model", "m", *flags])))}
        for flags in ([], ["--set", "select.threshold=6"])
    )
    same = {place for place in one if one[place] == other[place]}
    assert same == {(1, stage) for stage in ("instruct", "answer", "assess", "measure")}


def job_list(*flags: str) -> list[Job]:
    return list(jobs(run.resolve(run.parser().parse_args(["--model", "m", *flags]))))


def test_jobs_of_the_baselines_are_those_that_they_do() -> None:
    """What is the same is shared; what is not done is no job."""
    own = {job.key: job for job in job_list("--iterations", "1")}
    assert {job.key for job in job_list("--baseline", "dromedary_iter1")} == own.keys()
    unrated = job_list("--baseline", "self_instruct")
    assert [job.stage for job in unrated] == ["instruct", "answer", "measure", "train"]
    assert [job.key in own for job in unrated] == [True, True, True, False]
    other = job_list("--baseline", "self_instruct_2022")
    assert [job.stage for job in other] == ["instruct", "answer", "answer", "measure", "train"]
    assert not {job.key for job in other} & own.keys()
    assert other[0].row_tokens < unrated[0].row_tokens, "shorter prompts, no inputs"
    engraved = job_list("--baseline", "dromedary")
    assert [job.key in own for job in engraved] == [True, False, False, False]


def test_jobs_of_topics_and_of_long_answers() -> None:
    topics = job_list("--baseline", "dromedary", "--set", "instruct.method=topics")
    assert [job.num_rows for job in topics] == [20, 200, 200, 200, 200]
    short = job_list("--baseline", "dromedary")
    longer = job_list("--baseline", "dromedary", "--set", "answer.verbose=true")
    assert longer[: len(short)] == short
    assert [job.stage for job in longer[len(short) :]] == ["answer", "measure", "train"]
    assert longer[len(short)].row_tokens > short[1].row_tokens


@pytest.mark.parametrize(
    ("body", "flags", "sentence"),
    [
        ("[grid]\nselect.treshold = [1]", [], r"unknown setting .*Did you mean select\.threshold"),
        ("[grid]\nselect.threshold = 1", [], "is no list of values"),
        ("[grid]\nselect.threshold = []", [], "is no list of values"),
        ("", [], r"needs \[cells\] or \[grid\]"),
        ('[grid]\ndtype = ["float32", "bfloat16"]', [], "share one model: dtype"),
        ("[grid]\nseed = [0, 1]", ["--scale", "0"], "--scale must be"),
        ("[grids]\nseed = [0, 1]", [], r"unknown setting .grids"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, flags: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        dry_run(monkeypatch, "--model", "m", "--recipe", write_recipe(tmp_path, body), *flags)


def test_a_recipe_that_is_not_there_and_flags_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='Did you mean "threshold"'):
        dry_run(monkeypatch, "--model", "m", "--recipe", "treshold")
    with pytest.raises(UserError, match="with --recipe"):
        dry_run(monkeypatch, "--model", "m")


def test_a_journal_is_taken_from_the_first_run_that_has_the_same(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2), ("c", 2)):
        with Journal(tmp_path / name / "x", {"value": value}) as journal:
            (tmp_path / name / "y.safetensors").write_text(name)
            seal_at_once(journal, [{"from": name}])
    others = [tmp_path / name for name in "abc"]

    def take(name: str, value: int) -> Journal:
        return Journal(tmp_path / name / "x", {"value": value}, None, others, ["y.safetensors"])

    with take("d", 2) as journal:
        assert journal.sealed and journal.rows() == [{"from": "b"}]
        assert (tmp_path / "d" / "y.safetensors").read_text() == "b"
    with take("e", 3) as journal:
        assert not journal.sealed
        journal.append("k", [])
    (tmp_path / "b" / "y.safetensors").unlink()
    with take("f", 2) as journal:
        assert journal.rows() == [{"from": "c"}]
    with Journal(tmp_path / "g" / "x", {"value": 2}) as journal:
        journal.append("k", [])
    with take("g", 2) as journal:  # begun: it is gone on with
        assert not journal.sealed and "k" in journal.done


def test_a_store_gives_what_it_knows_before_it_asks_for_more(tmp_path: Path) -> None:
    sampler, store = ScriptedSampler(batch=1), Store(tmp_path / "store", "m", "float32", "raw")

    def requests(start: int = 0, adapter: str | None = None) -> Iterator[Request]:
        return (Request(f"iter1/instruct/{k}", (k + 1,), adapter=adapter) for k in count(start))

    def first(n: int, adapter: str | None = None, seed: int = 0, digest: str = "") -> dict[str, Completion]:
        found = store.stream(requests(0, adapter), sampler.stream, seed, lambda name: f"{name} {digest}")
        return {completion.id: completion for completion in islice(found, n)}

    few = first(5)
    sampled = len(sampler.seen)
    assert first(5) == few and len(sampler.seen) == sampled  # an endless source, and nothing is sampled
    more = first(12)
    assert few.items() <= more.items() and len(more) == 12
    assert set(Counter(request.id for request in sampler.seen).values()) == {1}
    store.close()
    store = Store(tmp_path / "store", "m", "float32", "raw")
    before = len(sampler.seen)
    assert first(12).keys() == more.keys() and len(sampler.seen) == before
    for changed in ({"seed": 1}, {"adapter": "iter1"}, {"adapter": "iter1", "digest": "other"}):
        before = len(sampler.seen)
        first(1, **changed)  # type: ignore[arg-type]
        assert len(sampler.seen) > before
    store.close()
    with pytest.raises(UserError, match="dtype"):
        Store(tmp_path / "store", "m", "bfloat16", "raw")


def test_what_asks_for_vectors_is_sampled_each_time(tmp_path: Path) -> None:
    """They are not kept: a cell catches as much as if it had run alone."""
    sampler, store = ScriptedSampler(batch=1), Store(tmp_path / "store", "m", "float32", "raw")
    requests = [Request("plain", (1,)), Request("pooled", (1,), SamplingParams(pool=True))]
    for seen in (["plain", "pooled"], ["plain", "pooled", "pooled"]):
        found = list(store.stream(requests, sampler.stream, 0, str))
        assert sorted(completion.id for completion in found) == ["plain", "pooled"]
        assert [request.id for request in sampler.seen] == seen
    store.close()
