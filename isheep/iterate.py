"""THE ALGORITHM (the paper's Algorithm 1): generate, answer, assess, select, train, and again with the better model.

M_0 = M_base. For t = 1 ... T: M_{t-1} writes instructions, answers them and rates its answers; the pairs that pass are
D_t, and M_t is what the run's setting says to train on them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from isheep.alarms import is_out_of_patience
from isheep.session import Session
from isheep.stages import Iteration
from isheep.stages.answer import answer
from isheep.stages.assess import assess
from isheep.stages.instruct import instruct, take_again
from isheep.stages.measure import measure
from isheep.stages.select import select
from isheep.stages.show import show
from isheep.stages.train import Start, fresh_on_base, stacked_on_last, train
from isheep.summary import write_summary


class Setting(NamedTuple):
    trained: Start  # the adapter that training starts from
    on: Callable[[Iteration], list[Path]]  # the data sets that it is trained on


def last(it: Iteration) -> list[Path]:
    """D_t, the data of this iteration alone."""
    return [it.file("dataset.json")]


def so_far(it: Iteration) -> list[Path]:
    """D_1 … D_t, the data of all iterations."""
    return [it.folder.parent / f"iter{t}" / "dataset.json" for t in range(1, it.number + 1)]


SETTINGS = {
    "one_base": Setting(trained=fresh_on_base, on=last),  # the paper's default
    "one_last": Setting(trained=stacked_on_last, on=last),
    "total_base": Setting(trained=fresh_on_base, on=so_far),
    "direct": Setting(trained=fresh_on_base, on=last),  # all data at once: one iteration of 20,000
}


def iterate(run: Session) -> None:
    """Run the loop, or what is left of it: every stage finds what an earlier start has finished."""
    cfg, model, tokenizer = run.cfg, run.model, run.tokenizer
    setting = SETTINGS[cfg.setting]
    earlier: list[Path] = []
    for t in range(1, run.num_iterations + 1):
        it = run.iteration(t)
        with run.stage(it, "instruct"):
            if cfg.answer.verbose and earlier:
                take_again(it, earlier[-1])
            else:
                instruct(it, run.stream, tokenizer, run.seeds, earlier, cfg.instruct)
        with run.stage(it, "answer"):
            vector_size = model.config.hidden_size if cfg.measure.catches else None
            answer(it, run.stream, tokenizer, run.seeds, cfg.answer, vector_size)
        if cfg.scores:
            with run.stage(it, "assess"):
                assess(it, run.stream, tokenizer, cfg.select.threshold, cfg.assess)
        run.free_cache()
        if cfg.measure.enabled:
            with run.stage(it, "measure"):
                measure(it, model, tokenizer, cfg.measure, run.mesh)
        with run.stage(it, "select"):
            select(it, cfg.select, cfg.scores, cfg.measure.pooling, model.device)
        run.alarms.look_at_data(it)
        with run.stage(it, "train"):
            train(it, model, tokenizer, run.template, setting.trained, setting.on(it), cfg.train, run.mesh)
        with run.stage(it, "show"):
            show(it, run.stream, tokenizer, run.template)
        earlier.append(it.file("instructions.jsonl"))
        print(write_summary(run.out))
        run.alarms.look_at_training(it)
        if is_out_of_patience(run.out, t, cfg.patience):
            break
    run.free_cache()
