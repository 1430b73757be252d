"""Instructions are sampled until enough are kept, judged in prompt order, and the same bytes however it went."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from isheep.config import InstructConfig, UserError
from isheep.sampler.request import Request
from isheep.stages import instruct as module
from isheep.stages import kept, read_sealed
from isheep.stages.instruct import instruct, take_again
from isheep.stages.lists import MixedLists
from isheep.text.tokenizer import Tokenizer
from isheep.text.topics import TYPES
from tests.scripted import (
    ScriptedSampler,
    Stopped,
    folder_bytes,
    items,
    iteration,
    seed_rows,
    stopping,
    tiny_tokenizer,
    words,
)

CFG = InstructConfig(data_size=11, num_in_context=3)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    return write_seeds(tmp_path / "seeds.jsonl", seed_rows())


def write_seeds(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def play(request: object) -> str:
    return items(request.id, first=4)  # type: ignore[attr-defined]


def run(tmp_path: Path, seeds: Path, tokenizer: Tokenizer, sampler: ScriptedSampler, cfg: InstructConfig = CFG) -> Path:
    it = iteration(tmp_path)
    instruct(it, sampler.stream, tokenizer, seeds, [], cfg)
    return it.folder


def test_exactly_data_size_are_kept_and_the_dropped_ones_stay_in_the_file(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer
) -> None:
    folder = run(tmp_path, seeds, tokenizer, ScriptedSampler(play))
    rows = read_sealed(folder / "instructions.jsonl")
    assert len(kept(rows)) == 11
    assert rows[-1]["verdict"] == "kept"  # nothing is read beyond the last one needed
    assert {row["reason"] for row in rows if row["verdict"] == "dropped"} == {"too_short"}
    first = kept(rows)[0]
    assert rows[0]["id"] == "iter1/0.0" and len(first["most_similar"]) == 8  # as many as the pool had
    assert first["most_similar"][0][1] >= first["most_similar"][-1][1] and 0 < first["mean_similarity"] < 1
    completions = read_sealed(folder / "completions.jsonl")
    assert [row["prompt"] for row in completions] == list(range(len(completions)))
    assert rows[-1]["id"].startswith(f"iter1/{len(completions) - 1}.")


def test_each_prompt_shows_its_own_seeds(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    sampler = ScriptedSampler(play)
    folder = run(tmp_path, seeds, tokenizer, sampler)
    shown = [row["examples"] for row in read_sealed(folder / "completions.jsonl")]
    assert all(len(set(ids)) == 3 for ids in shown)
    assert len({tuple(ids) for ids in shown}) > 1
    prompt = tokenizer.decode(list(next(r for r in sampler.seen if r.id == "iter1/instruct/0").prompt_token_ids))
    texts = {row["id"]: row["instruction"] for row in seed_rows()}
    assert all(texts[i] in prompt for i in shown[0]) and prompt.endswith("4. Instruction:")


def test_the_bytes_do_not_depend_on_the_order_of_arrival(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    results = [
        folder_bytes(run(tmp_path / str(i), seeds, tokenizer, ScriptedSampler(play, batch, shuffle=i)))
        for i, batch in enumerate((1, 3, 8, 20))
    ]
    assert all(result == results[0] for result in results)


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    whole = folder_bytes(run(tmp_path / "whole", seeds, tokenizer, ScriptedSampler(play)))
    for after in range(5):
        it = iteration(tmp_path / f"stopped{after}")
        asked = []
        for attempt in range(20):
            sampler = ScriptedSampler(play, batch=5, shuffle=attempt)
            try:
                instruct(it, stopping(sampler, after + attempt // 2), tokenizer, seeds, [], CFG)
                break
            except Stopped:
                done = (it.folder / "completions.jsonl.part").read_bytes().split(b"\n")[1:-1]
                keys = {json.loads(line)["key"] for line in done}
                assert keys >= set(asked)  # no finished completion is lost
                asked = sorted(keys)
        assert folder_bytes(it.folder) == whole


def test_a_finished_stage_samples_nothing(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    run(tmp_path, seeds, tokenizer, ScriptedSampler(play))
    again = ScriptedSampler(play)
    run(tmp_path, seeds, tokenizer, again)
    assert again.seen == []


def test_max_prompts_goes_on_with_less(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = ScriptedSampler(play)
    folder = run(tmp_path, seeds, tokenizer, sampler, InstructConfig(data_size=50, num_in_context=3, max_prompts=3))
    assert 0 < len(kept(read_sealed(folder / "instructions.jsonl"))) < 50
    assert len(read_sealed(folder / "completions.jsonl")) == len(sampler.seen) == 3
    assert "after all 3 prompts" in caplog.text


def test_what_an_earlier_iteration_kept_is_not_kept_again(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    first = run(tmp_path, seeds, tokenizer, ScriptedSampler(play))

    def same(request: object) -> str:
        return items(request.id.replace("iter2", "iter1"), first=4)  # type: ignore[attr-defined]

    it = iteration(tmp_path, number=2)
    cfg = InstructConfig(data_size=11, num_in_context=3, max_prompts=3)
    instruct(it, ScriptedSampler(same).stream, tokenizer, seeds, [first / "instructions.jsonl"], cfg)
    rows = read_sealed(it.file("instructions.jsonl"))
    assert rows and {row["reason"] for row in rows} == {"similar", "too_short"}
    similar = next(row for row in rows if row["reason"] == "similar")
    assert similar["most_similar"][0] == [similar["id"].replace("iter2", "iter1"), 1.0]


def test_no_item_at_all_is_an_empty_result(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    cfg = InstructConfig(num_in_context=3, max_prompts=2)
    folder = run(tmp_path, seeds, tokenizer, ScriptedSampler(lambda _: "no list"), cfg)
    assert read_sealed(folder / "instructions.jsonl") == []


def test_malformed_seed_rows_are_skipped_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    seeds = write_seeds(tmp_path / "s.jsonl", [*seed_rows(4), {"id": "x"}, {"instruction": 3}])
    run(tmp_path, seeds, tokenizer, ScriptedSampler(play))
    assert "skipped 2 malformed rows" in caplog.text


@pytest.mark.parametrize(
    ("rows", "words"),
    [(seed_rows(2), "has 2 seed tasks, but each prompt shows 3"), ([{"id": "x"}, {"no": 1}], "none of the 2 rows")],
)
def test_too_few_seeds_stop_the_run(tmp_path: Path, tokenizer: Tokenizer, rows: list, words: str) -> None:
    seeds = write_seeds(tmp_path / "s.jsonl", rows)
    with pytest.raises(UserError, match=words):
        run(tmp_path, seeds, tokenizer, ScriptedSampler(play))


def test_other_settings_are_refused(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    run(tmp_path, seeds, tokenizer, ScriptedSampler(play))
    with pytest.raises(UserError, match=r"temperature \(1.0, now 0.5\)"):
        run(
            tmp_path,
            seeds,
            tokenizer,
            ScriptedSampler(play),
            InstructConfig(data_size=11, num_in_context=3, temperature=0.5),
        )


def echo(request: Request) -> str:
    """Every third prompt of a call is answered with the items of the first."""
    k = int(request.id.rpartition("/")[2])
    return items("first" if k % 3 == 0 else request.id, first=4)


@pytest.mark.parametrize(("pool", "num_copies"), [("global", 0), ("call", 2)])
def test_the_pool_of_a_call_forgets_what_came_before(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, pool: str, num_copies: int
) -> None:
    """Calls take 6 prompts at a time until 9 are kept: three of them in 18 prompts."""
    monkeypatch.setattr(module, "CALL_PROMPTS", 6)
    monkeypatch.setattr(module, "CALL_KEPT", 9)
    cfg = InstructConfig(data_size=1000, num_in_context=3, max_prompts=18, dedup_pool=pool)
    it = iteration(tmp_path / "whole")
    instruct(it, ScriptedSampler(echo).stream, tokenizer, seeds, [], cfg)
    whole = folder_bytes(it.folder)
    found = Counter(row["instruction"] for row in kept(read_sealed(it.file("instructions.jsonl"))))
    first = {row["instruction"] for row in kept(read_sealed(it.file("instructions.jsonl"))) if "/0." in row["id"]}
    assert first and {found[text] - 1 for text in first} == {num_copies}
    for after in range(0, 18, 5):
        again = iteration(tmp_path / f"stopped{after}")
        with pytest.raises(Stopped):
            instruct(again, stopping(ScriptedSampler(echo), after), tokenizer, seeds, [], cfg)
        instruct(again, ScriptedSampler(echo, shuffle=after).stream, tokenizer, seeds, [], cfg)
        assert folder_bytes(again.folder) == whole


def test_the_pool_of_a_call_knows_nothing_of_earlier_iterations(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer
) -> None:
    first = run(tmp_path, seeds, tokenizer, ScriptedSampler(play))
    it, cfg = iteration(tmp_path, number=2), InstructConfig(data_size=11, num_in_context=3, dedup_pool="call")
    same = ScriptedSampler(lambda request: items(request.id.replace("iter2", "iter1"), first=4))
    instruct(it, same.stream, tokenizer, seeds, [first / "instructions.jsonl"], cfg)
    rows = [[row["instruction"] for row in kept(read_sealed(f / "instructions.jsonl"))] for f in (first, it.folder)]
    assert rows[0] == rows[1]


MIXED = InstructConfig(
    method="self_instruct", data_size=40, num_in_context=3, num_generated=2, presence_penalty=2.0, stop=("\n16.",)
)


def listed(request: Request) -> str:
    """Three instructions that go on with a list of three, the first too short."""
    texts = ["Go", *(f"Describe {words(f'{request.id} {j}', 9)}" for j in range(2))]
    return "".join(f" {text}\n{n}." for n, text in enumerate(texts, 5)) + " Describe the rest of the harbor island"


def test_lists_show_the_models_own_tasks_from_the_second_round_on(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixedLists, "round_len", 4)
    sampler = ScriptedSampler(listed, batch=8, shuffle=1)
    folder = run(tmp_path, seeds, tokenizer, sampler, MIXED)
    rows = {row["id"]: row for row in read_sealed(folder / "instructions.jsonl")}
    completions = read_sealed(folder / "completions.jsonl")
    assert len(completions) > 8 and {row["num_items"] for row in completions} == {4}
    for row in completions:
        own = [shown for shown in row["examples"] if shown in rows]
        assert len(row["examples"]) == 3 and len(own) == (2 if row["prompt"] >= 4 else 0)
        for shown in own:
            k = int(shown.removeprefix("iter1/").partition(".")[0])
            assert k < row["prompt"] // 4 * 4 and rows[shown]["verdict"] == "kept"
    assert len({tuple(row["examples"]) for row in completions}) == len(completions)
    assert {row["input"] for row in rows.values()} == {""} and len(kept(rows.values())) == 40
    last = completions[-1]
    request = next(r for r in sampler.seen if r.id == f"iter1/instruct/{last['prompt']}")
    prompt = tokenizer.decode(list(request.prompt_token_ids))
    assert all(rows[shown]["instruction"] in prompt for shown in last["examples"] if shown in rows)
    assert prompt.endswith("\n4.") and request.params.stop == ("\n16.",) and request.params.presence_penalty == 2.0


def test_rounds_give_the_same_bytes_in_any_order_and_wherever_they_are_stopped(
    tmp_path: Path, seeds: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixedLists, "round_len", 4)
    whole = folder_bytes(run(tmp_path / "whole", seeds, tokenizer, ScriptedSampler(listed), MIXED))
    for batch in (1, 3, 50):
        sampler = ScriptedSampler(listed, batch, shuffle=batch)
        assert folder_bytes(run(tmp_path / str(batch), seeds, tokenizer, sampler, MIXED)) == whole
    for after in range(0, 14, 2):
        it = iteration(tmp_path / f"stopped{after}")
        with pytest.raises(Stopped):
            instruct(it, stopping(ScriptedSampler(listed, 5, shuffle=after), after), tokenizer, seeds, [], MIXED)
        instruct(it, ScriptedSampler(listed, shuffle=7).stream, tokenizer, seeds, [], MIXED)
        assert folder_bytes(it.folder) == whole


def test_the_last_item_of_a_list_counts_unless_it_was_cut() -> None:
    method, text = MixedLists("key", [], MIXED), " Name a tree.\n5. Name a riv"
    assert [item["instruction"] for item in method.read(text, is_cut=False)[0]] == ["Name a tree.", "Name a riv"]
    assert [item["instruction"] for item in method.read(text, is_cut=True)[0]] == ["Name a tree."]


def topical(request: Request) -> str:
    """Two topics a type, none for the first; a question a topic."""
    if "/topics/" in request.id:
        return "" if request.id.endswith("/0") else f" {words(request.id, 2)}\n2. {words(f'{request.id} b', 2)}"
    return f" Tell me of {words(request.id, 9)}?"


@pytest.mark.parametrize(("data_size", "num_kept"), [(1000, 38), (25, 25)])
def test_topics_end_when_all_are_used_or_enough_is_kept(
    tmp_path: Path,
    seeds: Path,
    tokenizer: Tokenizer,
    data_size: int,
    num_kept: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = InstructConfig(method="topics", data_size=data_size)
    folder = run(tmp_path, seeds, tokenizer, sampler := ScriptedSampler(topical), replace(cfg, num_in_context=3))
    rows = read_sealed(folder / "instructions.jsonl")
    assert len(kept(rows)) == len(rows) == num_kept
    assert ("after all 38 prompts" in caplog.text) == (num_kept < data_size)
    topics = read_sealed(folder / "topics.jsonl")
    assert [len(row["topics"]) for row in topics] == [0] + [2] * 19
    assert [row["type"] for row in topics] == list(TYPES)
    shown = [row["examples"] for row in read_sealed(folder / "completions.jsonl")]
    assert shown[:19] == [[f"iter1/topics/{i}.0"] for i in range(1, 20)], "one of each type comes first"
    first = next(r for r in sampler.seen if r.id == "iter1/instruct/0")
    prompt = tokenizer.decode(list(first.prompt_token_ids))
    assert f"Type: {TYPES[1]}\nTopic: {topics[1]['topics'][0]}\n" in prompt and first.params.stop == ("\n",)


def test_topics_are_stopped_anywhere_and_go_on(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    cfg = InstructConfig(method="topics", data_size=30, num_in_context=3)
    whole = folder_bytes(run(tmp_path / "whole", seeds, tokenizer, ScriptedSampler(topical), cfg))
    for after in (0, 7, 20, 33, 47):
        it = iteration(tmp_path / f"stopped{after}")
        with pytest.raises(Stopped):
            instruct(it, stopping(ScriptedSampler(topical, shuffle=after), after), tokenizer, seeds, [], cfg)
        rest = ScriptedSampler(topical, shuffle=1)
        instruct(it, rest.stream, tokenizer, seeds, [], cfg)
        assert folder_bytes(it.folder) == whole
        assert len([r for r in rest.seen if "/topics/" in r.id]) == max(0, 20 - after)


def test_an_earlier_iterations_instructions_are_taken_again(tmp_path: Path, seeds: Path, tokenizer: Tokenizer) -> None:
    first = run(tmp_path, seeds, tokenizer, ScriptedSampler(play)) / "instructions.jsonl"
    it = iteration(tmp_path, number=2)
    for _ in range(2):
        take_again(it, first)
        assert read_sealed(it.file("completions.jsonl")) == []
        rows, again = kept(read_sealed(first)), read_sealed(it.file("instructions.jsonl"))
        assert [row["id"] for row in again] == [row["id"].replace("iter1", "iter2") for row in rows]
        assert [row["instruction"] for row in again] == [row["instruction"] for row in rows] and len(rows) == 11
