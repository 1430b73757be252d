"""The prompts of Self-Instruct (2022), a baseline: tasks, whether they are classifications, and instances of them.

All are raw completion prompts. The method is that paper's; the words are this project's own.
"""

import re
from collections.abc import Sequence

from isheep.text.lists import numbered
from isheep.text.prompts import NO_INPUT
from isheep.text.seeds import SeedTask

NEXT_TASK = "\nTask:"  # where an answer ends and the model goes on with a task of its own
FIELDS = ("Input", "Output")


def task_list_prompt(instructions: Sequence[str]) -> str:
    """The model goes on with the next number; read its text with `parse_numbered`."""
    return f"Here is a list of tasks, each of another kind:\n{numbered(instructions)}{len(instructions) + 1}."


def classification_prompt(instruction: str, examples: Sequence[SeedTask]) -> str:
    """Asks whether the task's output is one of a few labels; see `parse_classification`."""
    shown = [_question(example.instruction, " yes" if example.is_classification else " no") for example in examples]
    return (
        "A task is a classification if every output is one of a few fixed labels. Decide it for each of these "
        f"tasks.\n\n{''.join(shown)}{_question(instruction)}"
    )


def _question(instruction: str, reply: str = "") -> str:
    return f"Task: {' '.join(instruction.split())}\nClassification:{reply}" + ("\n\n" if reply else "")


def parse_classification(text: str) -> bool:
    return text.strip().lower().startswith("yes")


def instance_prompt(instruction: str, examples: Sequence[SeedTask], output_first: bool) -> str:
    """Asks for inputs and outputs of the task, in the order of its examples; see `parse_instances`.

    With the output first, the model thinks of a label and then of an input that has it, so it finds inputs for all
    labels and not for the commonest alone.
    """
    first, second = _order(output_first)
    shown = []
    for example in examples:
        field = {"Input": example.input.strip() or NO_INPUT, "Output": example.output.strip()}
        shown.append(f"Task: {example.instruction.strip()}\n{first}: {field[first]}\n{second}: {field[second]}\n\n")
    return (
        f'Think of instances of each task. The input of a task that needs none is "{NO_INPUT}".\n\n'
        f"{''.join(shown)}Task: {instruction.strip()}\n{first}:"
    )


def parse_instances(text: str, output_first: bool, is_cut: bool) -> list[dict[str, str]]:
    """The instances {input, output} of a completion, up to the first that does not have the fields in their order.

    The last field of a text that `is_cut` is discarded, and its instance with it.
    """
    order = _order(output_first)
    parts = re.split(rf"^({'|'.join(FIELDS)}):", f"{order[0]}:{text}", flags=re.MULTILINE)[1:]
    names, values = parts[::2], parts[1::2]
    whole = len(values) - is_cut
    instances = []
    for i in range(0, whole - 1, 2):
        if tuple(names[i : i + 2]) != order:
            break
        found = dict(zip(order, values[i : i + 2]))
        input = found["Input"].strip()
        instances.append({"input": "" if input.lower() == NO_INPUT else input, "output": found["Output"].strip()})
    return instances


def _order(output_first: bool) -> tuple[str, ...]:
    return FIELDS[::-1] if output_first else FIELDS
