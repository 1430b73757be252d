"""Every command that the README shows can be typed: `make` targets exist, flags of `python -m` parse."""

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def commands(markdown: str) -> Iterator[str]:
    """Command lines of code blocks and inline code: those with `python -m isheep...` or starting with `make `."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)
    for block in blocks:
        yield from filter(_is_ours, block.replace("\\\n", " ").split("\n"))
    yield from filter(_is_ours, re.findall(r"`([^`\n]+)`", prose))


def _is_ours(line: str) -> bool:
    return re.match(r"\s*(\$ )?(\w+=\S+ )*(make \w|\S*python3? -m isheep)", line) is not None


def words(command: str) -> list[str]:
    """Shell words without prompt, environment, comment and redirection; brackets mark optional flags and are shown."""
    kept = shlex.split(re.sub(r"[\[\]]|\$ ", "", command), comments=True)
    kept = [word for word in kept if not re.fullmatch(r"[A-Z_]+=.*", word)]
    ends = [i for i, word in enumerate(kept) if word in {">", "|", "&&", "2>", "&", ";"}]
    return kept[: ends[0]] if ends else kept


def check(command: str) -> None:
    """Raises AssertionError, ImportError or SystemExit where a command cannot be typed."""
    found = words(command)
    if found[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(found[1:]) <= set(targets), command
        return
    name, arguments = found[2], found[3:]
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{command}: there is no module {name}"
    module = importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
    if "--help" not in arguments:
        module.parser().parse_args(arguments)


def readme_commands() -> list[str]:
    return list(commands(README.read_text(encoding="utf-8"))) if README.exists() else []


@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_parses(command: str) -> None:
    check(command)


def test_the_readme_shows_commands() -> None:
    found = readme_commands()
    assert any(command.split()[0] == "make" for command in found)
    assert any("python -m isheep" in command for command in found)


def test_commands_are_found_in_blocks_and_prose() -> None:
    text = (
        "Type `make demo`, or make tea.\n```bash\n$ X=1 python -m isheep.run --model m \\\n  --out o  # why\nls\n```\n"
    )
    assert [words(command) for command in commands(text)] == [
        ["python", "-m", "isheep.run", "--model", "m", "--out", "o"],
        ["make", "demo"],
    ]


@pytest.mark.parametrize(
    "command", ["make tea", "python -m isheep.absent --x", "python -m isheep.sampler --no-such-flag"]
)
def test_a_command_that_cannot_be_typed_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, ImportError)):
        check(command)
