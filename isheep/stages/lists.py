"""Methods that have the model go on with a list of tasks: the paper's own, and Self-Instruct's (2022).

Each is a `Method` of instruct.py. `key` says whose prompts they are: what prompt k shows follows from (key, k).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from isheep.config import InstructConfig
from isheep.sampler.request import SamplingParams
from isheep.stages import Row
from isheep.text.lists import parse_numbered
from isheep.text.prompts import instruction_prompt, parse_instructions
from isheep.text.seeds import SeedTask
from isheep.text.self_instruct import task_list_prompt


def sampling(cfg: InstructConfig, stop: tuple[str, ...]) -> SamplingParams:
    """How all new text of the stage is drawn."""
    return SamplingParams(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        presence_penalty=cfg.presence_penalty,
        max_tokens=cfg.max_tokens,
        stop=stop,
    )


@dataclass(frozen=True)
class SeedLists:
    """Instructions with inputs, after some that are drawn from the seed tasks alone."""

    key: str
    tasks: Sequence[SeedTask]
    cfg: InstructConfig
    num_prompts = math.inf
    round_len = math.inf

    @property
    def params(self) -> SamplingParams:
        return sampling(self.cfg, self.cfg.stop)

    def prompt(self, k: int, before: Sequence[Row]) -> tuple[str, list[str]]:
        shown = random.Random(f"{self.key}/{k}").sample(self.tasks, self.cfg.num_in_context)
        return instruction_prompt(shown), [task.id for task in shown]

    def read(self, text: str, is_cut: bool) -> tuple[list[dict[str, str]], int]:
        return parse_instructions(text, self.cfg.num_in_context + 1)


class MixedLists(SeedLists):
    """Instructions alone, after some of the seed tasks and, as soon as there are any, some of the model's own."""

    round_len = 32

    def prompt(self, k: int, before: Sequence[Row]) -> tuple[str, list[str]]:
        draw, cfg = random.Random(f"{self.key}/{k}"), self.cfg
        own = draw.sample(before, min(cfg.num_generated, len(before)))
        seeds = draw.sample(self.tasks, cfg.num_in_context - len(own))
        shown = [(row["id"], row["instruction"]) for row in own] + [(task.id, task.instruction) for task in seeds]
        draw.shuffle(shown)
        return task_list_prompt([instruction for _, instruction in shown]), [shown_id for shown_id, _ in shown]

    def read(self, text: str, is_cut: bool) -> tuple[list[dict[str, str]], int]:
        items, num_malformed = parse_numbered(text, self.cfg.num_in_context + 1, is_cut)
        return [{"instruction": item, "input": ""} for item in items], num_malformed


LISTS = {"list": SeedLists, "self_instruct": MixedLists}
