"""The method that finds topics first: some for each of 20 types of question, then one instruction on each of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from isheep.config import InstructConfig
from isheep.log import Progress
from isheep.sampler.request import Completion, Request, SamplingParams
from isheep.stages import Iteration, Row, Stream, sample
from isheep.stages.lists import sampling
from isheep.text.tokenizer import Tokenizer
from isheep.text.topics import NUM_TOPICS, QUESTION_STOP, TOPICS_STOP, TYPES, parse_topics, topic_prompt, topics_prompt


@dataclass(frozen=True)
class OnTopics:
    """A prompt for each topic; see `isheep.stages.instruct.Method`."""

    topics: Sequence[tuple[str, str, str]]  # id, type, topic
    params: SamplingParams
    round_len = math.inf

    @property
    def num_prompts(self) -> float:
        return len(self.topics)

    def prompt(self, k: int, before: Sequence[Row]) -> tuple[str, list[str]]:
        topic_id, kind, topic = self.topics[k]
        return topic_prompt(kind, topic), [topic_id]

    def read(self, text: str, is_cut: bool) -> tuple[list[dict[str, str]], int]:
        question = " ".join(text.split())
        return ([], 1) if is_cut or not question else ([{"instruction": question, "input": ""}], 0)


def on_topics(it: Iteration, stream: Stream, tokenizer: Tokenizer, cfg: InstructConfig) -> OnTopics:
    """Find the topics, the first step of the method. The second begins with one of each type.

    writes  topics.jsonl   {type, topics, reply}, a row for each type; fewer topics where the reply has no more
    """
    params = sampling(cfg, TOPICS_STOP)
    kinds = {f"{it.name}/topics/{i}": kind for i, kind in enumerate(TYPES)}

    def requests() -> Iterator[Request]:
        for key, kind in kinds.items():
            yield Request(key, tuple(tokenizer.encode(topics_prompt(kind))), params, it.adapter)

    def found(completion: Completion) -> Row:
        topics = parse_topics(completion.text, completion.finish_reason == "length")
        return {"type": kinds[completion.id], "topics": topics, "reply": completion.text}

    with it.journal("topics.jsonl", {"types": list(TYPES), **asdict(params)}, {}) as journal:
        if not journal.sealed:
            with Progress(f"{it.name} topics", len(kinds)) as bar:
                sample(stream, requests(), journal, found, bar)
            journal.seal(kinds)
        rows = list(enumerate(journal.rows()))
    by_place = [
        (f"{it.name}/topics/{i}.{j}", row["type"], row["topics"][j])
        for j in range(NUM_TOPICS)
        for i, row in rows
        if j < len(row["topics"])
    ]
    return OnTopics(by_place, replace(params, stop=QUESTION_STOP))
