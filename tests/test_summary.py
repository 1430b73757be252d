"""The summary tells what the files hold, finished iterations and the one under way alike."""

from pathlib import Path

from isheep.log import Events
from isheep.summary import stage_counts, write_summary
from tests.scripted import sealed


def written(out: Path) -> Path:
    """A run whose first iteration is answered and not yet rated."""
    folder = out / "iter1"
    completions = [{"num_output_tokens": 40, "num_malformed": 1}, {"num_output_tokens": 60, "num_malformed": 0}]
    sealed(folder / "completions.jsonl", completions)
    instructions = [
        {"instruction": "One two three four.", "input": "x", "verdict": "kept", "reason": None},
        {"instruction": "One two.", "input": "", "verdict": "dropped", "reason": "too_short"},
        {"instruction": "One two three four five six.", "input": "", "verdict": "kept", "reason": None},
    ]
    sealed(folder / "instructions.jsonl", instructions)
    answers = [
        {"output": "a b c", "num_output_tokens": 5, "finish_reason": "length", "verdict": "kept", "reason": None},
        {"output": "", "num_output_tokens": 1, "finish_reason": "stop", "verdict": "dropped", "reason": "empty_output"},
    ]
    sealed(folder / "answers.jsonl", answers)
    events = Events(out / "events.jsonl")
    (out / "events.jsonl").write_text('{"event": "stage st\n')  # torn by a full disk
    for status, seconds, tokens in (("stopped", 2.0, 60), ("finished", 3.0, 40)):
        counts = {"num_decode_tokens": tokens, "num_prefill_tokens": 30, "num_cached_tokens": 70}
        events.write(f"stage {status}", iteration=1, stage="instruct", seconds=seconds, **counts)
    return folder


def test_counts_are_those_of_the_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    assert stage_counts(folder, "instruct") == {
        "prompts": 2,
        "completion tokens": 100,
        "items": 3,
        "malformed items": 1,
        "- too_short": 1,
        "kept": 2,
        "instruction words, mean/median": "5/5",
        "with an input, %": 50,
    }
    assert stage_counts(folder, "answer")["- empty_output"] == stage_counts(folder, "answer")["cut at max_tokens"] == 1
    assert stage_counts(folder, "assess") == {}


def test_the_table_adds_up_all_starts_and_leaves_out_what_is_not_done(tmp_path: Path) -> None:
    written(tmp_path / "run")
    text = write_summary(tmp_path / "run")
    assert (tmp_path / "run/summary.md").read_text() == text
    lines = [line.split("|") for line in text.split("\n") if line.startswith("|")]
    cells = {words.strip(): value.strip() for _, words, value, _ in lines}
    assert cells["instruct: seconds"] == "5.0" and cells["instruct: output tokens/s"] == "20"
    assert cells["instruct: prompt tokens from the cache, %"] == "70"
    assert cells["answer: kept"] == "1" and not any(words.startswith("assess") for words in cells)


def test_iterations_stand_in_order_and_samples_below(tmp_path: Path) -> None:
    Events(tmp_path / "events.jsonl").write("run started")
    for t in (1, 2, 10):
        row = {"model": f"iter{t}", "instruction": "Say it.", "input": "", "output": f"It\nis {t}."}
        sealed(tmp_path / f"iter{t}/samples.jsonl", [row])
    text = write_summary(tmp_path)
    header = [cell.strip() for cell in text.split("\n")[2].split("|")]
    assert header[2:-1] == ["iter1", "iter2", "iter10"]
    assert "**Say it.**\n\n- **iter1**: It is 1.\n- **iter2**: It is 2.\n- **iter10**: It is 10.\n" in text
