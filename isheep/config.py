"""Every setting of the project, as frozen dataclasses, and the model presets of configs/models.

A run's settings are one `RunConfig` with a section per stage. The defaults are the paper's constants; each section
names the place in the paper (arXiv 2408.08072) they come from. How they are read from files and from the command line
is in loading.py; a value out of its range is a `UserError` that says the range.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isheep.loading import (  # noqa: F401  as_overrides, diff, settings and to_toml are offered here too: one import for a config
    UserError,
    as_overrides,
    did_you_mean,
    diff,
    load_config,
    merge,
    settings,
    to_toml,
)

DTYPES = ("bfloat16", "float32", "float16")
SETTINGS = ("one_base", "one_last", "total_base", "direct")
ASSESS_PROMPTS = ("simple", "combined", "icl")
# The scores that a pair is rated for, in the order they are asked, and kept for.
ASSESS_LEVELS: dict[str, tuple[str, ...]] = {
    "none": (),
    "quality": ("quality",),
    "following": ("following",),
    "both": ("quality", "following"),
}
SELECT_METHODS = ("threshold", "ppl", "density", "density_ppl")
# On an instruction or its input, a text-only model cannot serve these words.
BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram"),
)
INSTRUCT_METHODS = ("list", "self_instruct", "topics")
ANSWER_METHODS = ("zero_shot", "instances", "principles")
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What the paper compares with. A value under `BASELINES` or `IMPLIED` holds where nothing else is said.
_ONCE = {"setting": "one_base", "iterations": 1}
_UNRATED = {"select": {"method": "threshold", "threshold": 0}}
_AS_THE_LOOP = {"instruct": {"method": "list"}, "answer": {"method": "zero_shot"}}
BASELINES: dict[str, dict[str, Any]] = {
    "self_instruct": _ONCE | _UNRATED | _AS_THE_LOOP,  # as the paper means it
    "self_instruct_2022": _ONCE
    | _UNRATED
    | {
        "instruct": {
            "method": "self_instruct",
            "num_in_context": 8,
            "num_generated": 2,
            "temperature": 0.7,
            "top_p": 0.5,
            "presence_penalty": 2.0,
            "max_tokens": 1024,
            "stop": ["\n16."],
            "blacklist": list(BLACKLIST[:13]),  # without video, audio, music, flowchart, diagram
            "refused_starts": ["Write a program"],
        },
        "answer": {"method": "instances", "temperature": 0.0, "max_tokens": 300},
    },
    "dromedary_iter1": _ONCE | _AS_THE_LOOP,  # as the paper means it
    "dromedary": _ONCE
    | _UNRATED
    | {
        "answer": {"method": "principles", "temperature": 0.5, "max_tokens": 256},
        "train": {
            "r": 16,
            "alpha": 16,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "learning_rate": 4e-4,
            "batch_size": 768,
            "epochs": 1,
            "cutoff": 512,
            "warmup_steps": 100,
            "max_samples": 1_000_000,  # all
        },
    },
}
# key -> value -> what comes with it. A second iteration answers the first one's instructions again: no copies to fear.
IMPLIED: dict[str, Mapping[Any, dict[str, Any]]] = {
    "setting": {"direct": {"iterations": 1, "instruct": {"data_size": 20_000}}},
    "baseline": BASELINES,
    "answer.verbose": {True: {"setting": "one_base", "iterations": 2, "alarm": {"max_duplicates": 1.0}}},
}
# Of what is implied, these cannot be changed: it would be something else.
ESSENTIAL = ("setting", "iterations", "instruct.method", "answer.method", "select.method", "select.threshold")


def implied(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """'setting = "direct"' -> the defaults it brings along, for each of `said` (dotted keys) that brings some."""
    found = [(key, value, layer) for key, table in IMPLIED.items() for value, layer in table.items()]
    return {as_overrides({key: value})[0].replace("=", " = "): layer
            for key, value, layer in found if said.get(key) == value}  # fmt: skip


def load_run(
    *sources: Mapping[str, Any] | Path,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    cell: Sequence[str] = (),
) -> "RunConfig":
    """A run's settings: `sources`, then `flags`, then "key=value" overrides, then those of a recipe's cell.

    What a value implies stands below all of them. What makes it what it is stands above the sources, which were written
    for any method, if a flag, an override or a cell chose it, and above the command line if a cell did; elsewhere
    another value is a UserError.
    """
    in_files = implied(merge(RunConfig, *sources))
    layers = implied(merge(RunConfig, *sources, flags or {}, overrides=[*overrides, *cell]))
    chosen = essentials({source: layer for source, layer in layers.items() if source not in in_files})
    by_cell = as_overrides(essentials(implied(merge(RunConfig, overrides=cell))))
    texts = [*overrides, *by_cell, *cell]
    cfg = load_config(RunConfig, *layers.values(), *sources, chosen, flags or {}, overrides=texts)
    check_implied(cfg, layers)
    return cfg


def essentials(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of some layers, what makes them what they are."""
    found: dict[str, Any] = {}
    for layer in layers.values():
        for key, value in merge(RunConfig, layer).items():
            if key in ESSENTIAL:
                section, _, name = key.rpartition(".")
                (found.setdefault(section, {}) if section else found)[name] = value
    return found


def check_implied(cfg: "RunConfig", layers: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError where `cfg` has another value for what makes one of the `layers` what it is."""
    means: dict[str, tuple[str, Any]] = {}
    for source, layer in layers.items():
        means |= {key: (source, value) for key, value in merge(RunConfig, essentials({source: layer})).items()}
    is_now = merge(RunConfig, settings(cfg))
    for key, (source, value) in means.items():
        if is_now[key] != value:
            meant, found = (as_overrides({key: each})[0].partition("=")[2] for each in (value, is_now[key]))
            raise UserError(f"{source} means {key} = {meant}, not {found}: leave it at that, or choose something else.")


@dataclass(frozen=True)
class SamplerConfig:
    """The generation engine. Not in the paper: these change speed and memory, never a text (in float32)."""

    block_size: int = 16  # tokens in a block of the KV cache
    max_num_seqs: int = 64  # sequences that decode together
    max_num_batched_tokens: int = 2048  # tokens of one forward, prefill and decode together
    kv_cache_gib: float | None = None  # None: from the memory that is free
    prefix_caching: bool = True
    cuda_graphs: bool = True  # on a GPU, launch a decode step as a whole; a CPU has nothing to launch

    def __post_init__(self) -> None:
        _require(self, "block_size", self.block_size >= 16 and self.block_size % 16 == 0, "a multiple of 16")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "kv_cache_gib", self.kv_cache_gib is None or self.kv_cache_gib > 0, "above 0")


@dataclass(frozen=True)
class InstructConfig:
    """New instructions from the seeds (the paper's section on prompt generation and its appendix on filter rules).

    `method`: "list" goes on with a list of instructions and inputs, as the paper does; "self_instruct" with one of
    instructions alone, some of those shown being the model's own; "topics" asks for one on each of the topics that the
    model found for 20 types of question.
    """

    method: str = "list"
    data_size: int = 10_000  # kept instructions per iteration; the ablation goes to 50k
    num_in_context: int = 5  # tasks shown in each prompt of a list
    num_generated: int = 0  # how many of them are kept instructions of this iteration, as soon as there are some
    temperature: float = 1.0
    top_p: float = 0.95
    presence_penalty: float = 0.0
    max_tokens: int = 1000
    stop: tuple[str, ...] = ("17",)  # of a list: a completion gives items 6 to 16 at most
    min_words: int = 4
    max_words: int = 150
    blacklist: tuple[str, ...] = BLACKLIST
    refused_starts: tuple[str, ...] = ()  # an instruction that begins with one, in any case, is dropped
    rouge_threshold: float = 0.7  # strictly above, against the pool: dropped
    dedup_pool: str = "global"  # the pool: seeds and all that was kept; "call": seeds and the current call, as run
    max_prompts: int | None = None  # None: as many as data_size needs

    def __post_init__(self) -> None:
        _require_sampling(self)
        _require(self, "data_size", self.data_size >= 1, "at least 1")
        _choose(self, "method", INSTRUCT_METHODS)
        _require(self, "num_in_context", self.num_in_context >= 1, "at least 1")
        _require(self, "num_generated", 0 <= self.num_generated < self.num_in_context,
                 "at least 0 and below instruct.num_in_context")  # fmt: skip
        _require(self, "num_generated", self.num_generated == 0 or self.method == "self_instruct",
                 '0 unless instruct.method is "self_instruct"')  # fmt: skip
        _require(self, "presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        _require(self, "min_words", 0 <= self.min_words <= self.max_words, "between 0 and instruct.max_words")
        _require(self, "rouge_threshold", 0 <= self.rouge_threshold <= 1, "between 0 and 1")
        _require(self, "max_prompts", self.max_prompts is None or self.max_prompts >= 1, "at least 1")
        _choose(self, "dedup_pool", ("global", "call"))


@dataclass(frozen=True)
class AnswerConfig:
    """Zero-shot responses and the rule filter on pairs (the paper's section on responses).

    `method`: "zero_shot" is the paper's; "instances" finds an input as well, after seed tasks, the output first where
    the task is a classification; "principles" shows 16 rules and exemplars that think by them. Each has its own filter.
    `verbose`: a second iteration has the model trained on principles answer the same instructions again, at length.
    `option_letter_rule`: "as_run" also drops a pair for "e.g." and "i.e.", as the published scripts do.
    """

    method: str = "zero_shot"
    verbose: bool = False
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 1000
    option_letter_rule: str = "fixed"

    def __post_init__(self) -> None:
        _require_sampling(self)
        _choose(self, "method", ANSWER_METHODS)
        _require(self, "verbose", not self.verbose or self.method == "principles",
                 'false unless answer.method is "principles"')  # fmt: skip
        _choose(self, "option_letter_rule", ("fixed", "as_run"))


@dataclass(frozen=True)
class AssessConfig:
    """Self-assessment (the paper's section on it, and its ablations of prompt and level).

    `prompt`: "simple" and "combined" are two questions with criteria, one for each score; "icl" shows three rated
    examples and no criteria, and its one score serves as both. `level`: the scores that are asked for and tested;
    "none" asks nothing, see `SelectConfig`. `assessor`: "current" is the model of this iteration, as published; "base"
    the base model in each, as run. `score_decoding`: "sampled" with temperature and top_p, "greedy" without, or
    "expected", the mean over the probabilities of 1 to 10, which draws nothing and leaves no score unread.
    """

    prompt: str = "combined"
    level: str = "both"
    assessor: str = "current"
    score_decoding: str = "sampled"
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 1000

    def __post_init__(self) -> None:
        _require_sampling(self)
        _choose(self, "prompt", ASSESS_PROMPTS)
        _choose(self, "level", tuple(ASSESS_LEVELS))
        _choose(self, "assessor", ("current", "base"))
        _choose(self, "score_decoding", ("sampled", "greedy", "expected"))
        if self.prompt == "icl" and self.level in ("quality", "following"):
            raise UserError(
                f'assess.level = "{self.level}" needs a score of its own, but assess.prompt = "icl" asks for one that '
                'serves as both: choose level "both", or the prompt "simple" or "combined".'
            )


@dataclass(frozen=True)
class MeasureConfig:
    """Perplexities and last-layer vectors of the pairs (the ablation on filters by internal state).

    The paper does not say how it pools the vectors; the mean over tokens is this project's default. `context`: "none"
    is the paper's, the output alone and the fields of the pair joined; with "prompt" the output is scored given the
    prompt that it answers, and the pair is both: caught while answers are sampled, it costs no pass.
    """

    enabled: bool = True
    context: str = "none"
    pooling: str = "mean"
    batch_tokens: int = 4096  # tokens of one forward

    def __post_init__(self) -> None:
        _choose(self, "context", ("none", "prompt"))
        _choose(self, "pooling", ("mean", "last"))
        _require(self, "batch_tokens", self.batch_tokens >= 1, "at least 1")

    @property
    def catches(self) -> bool:
        """Whether the measures are caught while answers are sampled."""
        return self.enabled and self.context == "prompt"


@dataclass(frozen=True)
class SelectConfig:
    """Which pairs are trained on: both scores strictly above C = 8, or both perplexities below 50 (filter ablation).

    "density" keeps a random pair of each of K = 3000 clusters of their vectors, "density_ppl" that with the lowest
    pair_ppl.

    `threshold` is the paper's C, with its two special values: 0 is no self-assessment, nothing is asked and every pair
    that passed the rules is kept, as with assess.level "none"; -1 is not even the rules, every answer is kept (of
    which training leaves out the blank ones).
    """

    method: str = "threshold"
    threshold: float = 8.0
    max_ppl: float = 50.0
    num_clusters: int = 3000

    def __post_init__(self) -> None:
        _choose(self, "method", SELECT_METHODS)
        _require(self, "threshold", -1 <= self.threshold < 10, "at least -1 and below 10, the highest score")
        _require(self, "threshold", not -1 < self.threshold < 0,
                 "-1 (no rule filter), 0 (no self-assessment) or above")  # fmt: skip
        _require(self, "max_ppl", self.max_ppl > 1, "above 1")
        _require(self, "num_clusters", self.num_clusters >= 1, "at least 1")

    @property
    def rates(self) -> bool:
        """Whether scores are tested, so that there is a self-assessment."""
        return self.method == "threshold" and self.threshold > 0

    @property
    def clusters(self) -> bool:
        """Whether pairs are clustered by their vectors."""
        return self.method in ("density", "density_ppl")

    @property
    def pardons(self) -> bool:
        """Whether pairs are kept that the rules had dropped."""
        return self.method == "threshold" and self.threshold == -1


@dataclass(frozen=True)
class TrainConfig:
    """LoRA fine-tuning (the paper's training details): 16 rows a step, 3000 rows at most, the best checkpoint used."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ALL_LINEARS
    learning_rate: float = 5e-5
    lr_scheduler: str = "cosine"
    warmup_steps: int = 20
    epochs: float = 2.0
    batch_size: int = 16  # items of one optimizer step
    micro_batch_tokens: int = 4096  # tokens of one forward
    pack_tokens: int | None = None  # None: an item is a row; N: rows are packed into items of N tokens, best fit
    cutoff: int = 1024  # tokens of one row
    max_samples: int = 3000
    val_share: float = 0.1
    eval_steps: int = 100
    checkpoint_steps: int = 25  # what a kill costs at most; no result depends on it
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gradient_checkpointing: bool = True
    loss_chunk_tokens: int = 1024  # tokens whose logits exist at once

    def __post_init__(self) -> None:
        steps, tokens = "eval_steps checkpoint_steps", "cutoff micro_batch_tokens loss_chunk_tokens"
        for name in f"r alpha batch_size max_samples {steps} {tokens}".split():
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "epochs", "max_grad_norm", "eps"):
            _require(self, name, getattr(self, name) > 0, "above 0")
        for name in ("dropout", "val_share"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        _require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers of at least 0 and below 1")
        _require(self, "warmup_steps", self.warmup_steps >= 0, "at least 0")
        _require(self, "weight_decay", self.weight_decay >= 0, "at least 0")
        _require(self, "pack_tokens", self.pack_tokens is None or self.pack_tokens >= self.cutoff,
                 f"at least train.cutoff = {self.cutoff}, so that every row fits an item")  # fmt: skip
        _require(self, "target_modules", len(self.target_modules) > 0, "a list of at least one linear's name")
        _choose(self, "lr_scheduler", ("cosine", "constant"))


@dataclass(frozen=True)
class AlarmConfig:
    """When an iteration's data or training is reported as going wrong. Not in the paper, whose data would have rung."""

    on_alarm: str = "warn"  # or "stop": the run ends, to be mended or gone on with under "warn"
    min_survivors: int = 50  # rows that are left to train on
    min_length_ratio: float = 0.5  # median words of the outputs, compared with iteration 1
    max_duplicates: float = 0.02  # share of the instructions that repeat others
    max_full_marks: float = 0.9  # share of tens among the quality scores
    max_loss_ratio: float = 1.5  # the last loss of a training, compared with its best

    def __post_init__(self) -> None:
        _choose(self, "on_alarm", ("warn", "stop"))
        _require(self, "min_survivors", self.min_survivors >= 0, "at least 0")
        for name in ("min_length_ratio", "max_duplicates", "max_full_marks"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        _require(self, "max_loss_ratio", self.max_loss_ratio >= 1, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One run of the loop (Algorithm 1): which model, where to, how often, and a section for each stage."""

    model: str  # a name from configs/models, a hub id, or a local folder
    out: str  # the run folder
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "auto"
    baseline: str | None = None  # a method to compare with, instead of the paper's own
    setting: str = "one_base"
    iterations: int | None = None  # None: the model preset's, 3 where there is none
    patience: int | None = None  # iterations without a better validation loss, on each one's own rows; None: no end
    template: str | None = None  # None: the model preset's, or what the tokenizer's control tokens say
    seeds: str | None = None  # a file of seed tasks; None: the project's own 175
    paper_joins: bool = False  # instruction and input are joined as run: by "" to answer, " " to rate, "\n" to train
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    instruct: InstructConfig = field(default_factory=InstructConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    assess: AssessConfig = field(default_factory=AssessConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)

    def __post_init__(self) -> None:
        for name in ("model", "out"):
            _require(self, name, bool(getattr(self, name).strip()), "given")
        _require(self, "patience", self.patience is None or self.patience >= 1, "at least 1")
        _require(self, "iterations", self.iterations is None or self.iterations >= 1, "at least 1")
        _require(self, "seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        _choose(self, "dtype", DTYPES)
        _choose(self, "setting", SETTINGS)
        if self.baseline is not None:
            _choose(self, "baseline", tuple(BASELINES))
        _require(self, "device", re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
                 "auto, cpu, cuda or cuda:N")  # fmt: skip
        if self.measure.catches and self.answer.method != "zero_shot":
            raise UserError(
                f'measure.context = "prompt" catches zero-shot answers, not those of answer.method = '
                f'"{self.answer.method}": leave it at "none".'
            )
        if self.assess.level == "none" and self.select.rates:
            raise UserError(
                f'assess.level = "none" leaves select.threshold = {self.select.threshold:g} no score to test: choose '
                "another level, or set select.threshold = 0."
            )

    @property
    def scores(self) -> tuple[str, ...]:
        """The self-assessed scores that are asked for and tested, in this order; none without self-assessment."""
        return ASSESS_LEVELS[self.assess.level] if self.select.rates else ()


def _dotted(section: object, name: str) -> str:
    prefix = type(section).__name__.removesuffix("Config").lower()
    return name if prefix in ("run", "modelpreset") else f"{prefix}.{name}"


def _require(section: object, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{_dotted(section, name)} must be {rule}, not {getattr(section, name)!r}.")


def _choose(section: object, name: str, choices: Sequence[str]) -> None:
    value = getattr(section, name)
    if value not in choices:
        raise UserError(f'{_dotted(section, name)} = "{value}" is not known.{did_you_mean(value, choices)}')


def _require_sampling(section: InstructConfig | AnswerConfig | AssessConfig) -> None:
    _require(section, "temperature", section.temperature >= 0, "at least 0")
    _require(section, "top_p", 0 < section.top_p <= 1, "above 0 and at most 1")
    _require(section, "max_tokens", section.max_tokens >= 1, "at least 1")


@dataclass(frozen=True)
class ModelPreset:
    """A model of configs/models: where its weights are and how it is talked to.

    `source` is a hub id, or "package:NAME/FILE" for a file inside an installed Python package. `stop` are the control
    tokens that end a reply. `iterations` is the paper's number for this size. `architecture` holds config.json's
    values, so that a plan needs no download.
    """

    name: str
    source: str
    template: str
    stop: tuple[str, ...]
    iterations: int
    architecture: dict


def data_path(*parts: str) -> Path:
    """The path of a file or folder under configs/ or seeds/, in a checkout as in an installed wheel."""
    root = Path(__file__).parents[1]
    first, *rest = parts
    in_checkout = (root / "pyproject.toml").is_file()
    return root.joinpath(first if in_checkout else f"isheep_{first}", *rest)


@functools.cache
def model_presets() -> dict[str, ModelPreset]:
    """Name -> preset, for each file of configs/models."""
    files = sorted(data_path("configs", "models").glob("*.toml"))
    return {path.stem: load_config(ModelPreset, {"name": path.stem}, path) for path in files}


def model_preset(name: str) -> ModelPreset | None:
    """The preset of that name; None for a hub id or a folder."""
    return model_presets().get(name)
