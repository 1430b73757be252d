"""`python -m isheep.sampler`: rows in, rows out, resumed where it was stopped."""

import json
import sys
from pathlib import Path

import pytest

from isheep.config import UserError
from isheep.sampler import __main__ as command
from tests.tiny import tiny_model, write_checkpoint

ROWS = [
    {"id": "a", "prompt": "In the", "temperature": 0, "max_tokens": 5},
    {"id": "b", "messages": [{"role": "user", "content": "Say it"}], "n": 2},
    {"id": "c", "instruction": "Name it", "input": "a thing", "stop": ["zzz"], "seed": 3},
    {"instruction": "No id"},
    {"id": "bad", "text": "neither prompt nor instruction"},
    {"id": "worse", "prompt": "x", "temperature": -1},
    {"id": "lost", "prompt": "x", "adapter": "nobody"},
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    folder = write_checkpoint(tiny_model("llama_gqa"), tmp_path / "model")
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"torn')

    def call(*flags: str) -> list[dict]:
        argv = ["sampler", "--model", str(folder), "--prompts", str(prompts), "--out", str(out), "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", [*argv, "--max-tokens", "8", "--ignore-eos", *flags])
        command.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    call.out = out
    return call


def test_rows_become_completions_and_bad_rows_are_skipped(run, caplog):
    rows = run("--logprobs", "1")
    assert sorted((row["id"], row["sample"]) for row in rows) == [("3", 0), ("a", 0), ("b", 0), ("b", 1), ("c", 0)]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id["a"]["token_ids"]) == 5 and len(by_id["c"]["token_ids"]) == 8
    assert set(by_id["a"]) >= {"text", "finish_reason", "num_prompt_tokens", "num_cached_tokens", "logprobs"}


def test_stopped_in_the_middle_it_goes_on(run):
    whole = sorted(run(), key=lambda row: (row["id"], row["sample"]))
    lines = run.out.read_text().splitlines(keepends=True)
    first_b = next(i for i, line in enumerate(lines) if json.loads(line)["id"] == "b")
    run.out.write_text("".join(lines[: first_b + 1]) + lines[-1][:20])  # one of b's two samples, and a torn line
    assert sorted(run(), key=lambda row: (row["id"], row["sample"])) == whole


def test_other_settings_for_the_same_file_are_refused(run):
    run()
    with pytest.raises(UserError, match="top_p"):
        run("--top-p", "0.5")


def test_a_bad_flag_is_told_before_anything_loads(run):
    with pytest.raises(UserError, match="temperature"):
        run("--temperature", "-1")
    assert not Path(run.out).exists()


def test_every_parameter_has_a_flag_of_its_kind() -> None:
    flags = ["--pool", "--num-prompt-logprobs", "4", "--logprob-token-ids", "3", "5", "--ignore-eos", "--logprobs", "2"]
    args = command.parser().parse_args(["--model", "m", "--prompts", "in", "--out", "out", *flags])
    params = command.to_params({name: getattr(args, name) for name in command.PARAMS if name != "seed"})
    assert (params.pool, params.num_prompt_logprobs, params.logprob_token_ids) == (True, 4, (3, 5))
    assert (params.ignore_eos, params.logprobs) == (True, 2)
