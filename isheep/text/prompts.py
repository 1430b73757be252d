"""The prompts by which the model writes instructions and judges answers, and how its replies are read.

The paper (arXiv 2408.08072) describes these prompts; the words are this project's own.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from isheep.text.seeds import SeedTask

NO_INPUT = "<noinput>"  # written where a task has no input, so that the model says so instead of inventing one

_META_PROMPT = f"""\
Please write a list of 20 diverse tasks for a language model. Each task is an instruction, with an input where one is \
needed, and later we will look at how well the model carries it out.

The tasks have to meet these requirements:
1. Do not use the same verb twice: every instruction should ask for something in a way of its own.
2. Change the wording from task to task, with some instructions put as questions and others as commands.
3. Cover many types of task, for example open questions, sorting into classes, rewriting, short stories, planning, code.
4. A model that only reads and writes text must be able to do it. It cannot see, hear, or act in the world.
5. Write the instructions in English.
6. An instruction is one sentence or two, no more.
7. The input holds the material that the instruction speaks of. Make it realistic and concrete, never a mere \
placeholder, and ideally shorter than 100 words.
8. Some instructions need no input, for example a question about a well-known fact. Then write "{NO_INPUT}" as input.
9. A good output for the task stays under 100 words.

Here is the list of 20 tasks:
"""


def instruction_prompt(examples: Sequence[SeedTask], first_number: int = 1) -> str:
    """The raw completion prompt for new instructions: `examples` numbered from `first_number`, then the next number.

    The model goes on after "N. Instruction:"; read its text with `parse_instructions(text, N)`.
    """
    items = [_item(first_number + i, example) for i, example in enumerate(examples)]
    return f"{_META_PROMPT}\n{''.join(items)}###\n{first_number + len(examples)}. Instruction:"


def _item(number: int, example: SeedTask) -> str:
    instruction = " ".join(example.instruction.split()).rstrip(":")
    return f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{example.input.strip() or NO_INPUT}\n"


def parse_instructions(text: str, first_index: int = 6) -> tuple[list[dict[str, str]], int]:
    """The items {instruction, input} of a completion whose prompt ended with `first_index`'s "Instruction:".

    Items are separated by ### and numbered in order; each must have exactly its two fields. The second value counts
    the malformed ones. The last item is always discarded, and not counted: it may have been cut.
    """
    chunks = f"{first_index}. Instruction:{text}".split("###")[:-1]
    parsed = [_parse_item(first_index + i, chunk) for i, chunk in enumerate(chunks)]
    rows = [row for row in parsed if row is not None]
    return rows, len(parsed) - len(rows)


def _parse_item(number: int, chunk: str) -> dict[str, str] | None:
    parts = re.split(rf"\b{number}\.\s*(Instruction|Input):", chunk)
    if parts[1::2] != ["Instruction", "Input"]:
        return None
    instruction, input = parts[2].strip(), parts[4].strip()
    return {"instruction": instruction, "input": "" if input.lower() == NO_INPUT else input}


@dataclass(frozen=True)
class Question:
    """What the model is asked to rate, and the scores that its one number stands for."""

    what: str
    scores: tuple[str, ...]


QUESTIONS = {
    "quality": Question("the quality of the response", ("quality",)),
    "following": Question("how well the response follows the instruction", ("following",)),
    "overall": Question("the response", ("quality", "following")),
}


@dataclass(frozen=True)
class Rated:
    """A pair with a rating, to be shown before the pair that is asked about."""

    task: str
    output: str
    reply: str


@dataclass(frozen=True)
class Assessment:
    """A variant of the self-assessment: its questions with what a 1 and what a 10 mean, "" where it does not say."""

    criteria: dict[str, str]
    examples: tuple[Rated, ...] = ()


ASSESSMENTS: dict[str, Assessment] = {
    "simple": Assessment(
        {
            "quality": "1 means that the response is incorrect. 10 means that it is correct.",
            "following": (
                "1 means that the response does not do what the instruction asks. 10 means that it does all of it."
            ),
        }
    ),
    "combined": Assessment(
        {
            "quality": (
                "1 means that the response is incorrect, long-winded and unclear, and repeats itself in content or "
                "format. 10 means that it is correct, to the point and clear, without a superfluous word."
            ),
            "following": (
                "1 means that the response carries on with the instruction instead of answering it, or does not have "
                "the format that was asked for, or that the instruction itself cannot be understood. 10 means that "
                "the instruction is clear, and that the response answers it directly and in the format that was "
                "asked for."
            ),
        }
    ),
    "icl": Assessment(
        {"overall": ""},
        examples=(
            Rated(
                "Which household items can be used to clean a kettle, and why does each of them work?",
                "1. Vinegar\n2. Lemon juice\n3. Baking soda",
                "6||All three do clean a kettle, but the instruction also asks why, and nothing is explained.",
            ),
            Rated(
                "Turn the sentence into the past tense.\nThe gardener waters the roses before breakfast.",
                "Lisbon lies on the Atlantic coast and is known for its yellow trams.",
                "1||The response has nothing to do with the sentence that was to be changed.",
            ),
            Rated(
                "Write a slogan for a shop that repairs old bicycles.",
                "Old wheels, new roads.",
                "10||Short and easy to remember, and it says in four words what the shop is for.",
            ),
        ),
    ),
}

LEAD_IN = "As a strict rater who gives high marks only where they are earned, my score is:"

_ASSESS_PROMPT = """\
Below are an instruction and the response that a language model gave to it.

Instruction:
{task}

Response:
{output}

Please rate {what} on a scale from 1 to 10.{criteria}
Answer in the format <score>||<explanation>: first the score as a number, then two vertical bars, then a short \
explanation.

{lead_in}"""


def questions(variant: str, scores: Collection[str]) -> list[str]:
    """The questions of a variant whose answers give `scores` ("quality", "following"), in the order they are asked."""
    return [name for name in ASSESSMENTS[variant].criteria if set(QUESTIONS[name].scores) <= set(scores)]


def assess_prompt(row: Mapping[str, str], question: str, variant: str = "combined", joint: str = "\n") -> str:
    """Asks for a rating of `row` {instruction, input, output}; read the reply with `parse_score`.

    Raw text, the variant's examples first, each just as the row is and with its reply. It ends within the rater's
    sentence, so that the model goes on with a number. `joint` stands between instruction and input.
    """
    assessment = ASSESSMENTS[variant]
    criteria = f" {assessment.criteria[question]}" if assessment.criteria[question] else ""

    def ask(task: str, output: str) -> str:
        return _ASSESS_PROMPT.format(
            task=task, output=output, what=QUESTIONS[question].what, criteria=criteria, lead_in=LEAD_IN
        )

    shown = [f"{ask(example.task, example.output)} {example.reply}\n\n\n" for example in assessment.examples]
    task = f"{row['instruction']}{joint}{row['input']}" if row["input"] else row["instruction"]
    return "".join(shown) + ask(task, row["output"])


_NUMBER = r"[0-9]+(?:\.[0-9]+)?"


def parse_score(text: str) -> int | None:
    """The score 1..10 of an assessment's reply; None where none can be read, never a guess.

    It is the number at the start, else the one before "||". Decimals are rounded, a half to the even neighbour.
    """
    text = re.sub(r"^\W+", "", text)
    found = re.match(_NUMBER, text) or re.search(rf"{_NUMBER}(?=\s*\|\|)", text)
    score = round(min(float(found.group()), 11)) if found else 0  # 11: any number above 10, however long
    return score if 1 <= score <= 10 else None
