"""Files are whole or absent, and a journal ends in the same bytes wherever it was killed."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isheep.artifacts import Journal, canonical_json, read_rows, sha256_file, write_atomic
from isheep.config import UserError

SETTINGS = {"temperature": 1.0, "stop": ("17",)}
ROWS = {"b": [{"id": "b1", "text": "é\u2028\n"}, {"id": "b2"}], "a": [], "c": [{"id": "c1", "n": None}]}
ORDER = ["a", "b", "c"]


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow past `num_bytes` here: to the writer, a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_journal(path: Path) -> list[dict]:
    with Journal(path, SETTINGS) as journal:
        if journal.sealed:
            return journal.rows()
        for key, rows in ROWS.items():
            if key not in journal.done:
                journal.append(key, rows)
        return journal.seal(ORDER)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_journal_seals_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = write_journal(path)
    assert [row["id"] for row in rows] == ["b1", "b2", "c1"]
    assert rows[0]["text"] == "é\u2028\n"
    assert path.read_bytes().split(b"\n")[:-1] == [canonical_json(row).encode() for row in rows]
    seal = json.loads((tmp_path / "answers.jsonl.seal").read_text())
    assert (seal["rows"], seal["sha256"]) == (3, sha256_file(path))
    assert sorted(files(tmp_path)) == ["answers.jsonl", "answers.jsonl.seal"]
    assert write_journal(path) == rows  # a second start reads what was sealed


def test_keys_not_in_the_order_are_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path / "x", SETTINGS) as journal:
        journal.append("a", [{"id": 1}])
        journal.append("b", [{"id": 2}])
        assert journal.seal(["b"]) == [{"id": 2}]


def test_done_rows_look_the_same_before_and_after_a_restart(tmp_path: Path) -> None:
    with Journal(tmp_path / "x", SETTINGS) as journal:
        journal.append("a", [{"pair": (1, 2.5)}])
        before = journal.done
    with Journal(tmp_path / "x", SETTINGS) as journal:
        assert journal.done == before == {"a": [{"pair": [1, 2.5]}]}


def test_every_torn_length_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Cut the .part at every byte, as a kill or a power cut may, and go on."""
    whole = tmp_path / "whole"
    with Journal(whole / "x", SETTINGS) as journal:
        for key, rows in ROWS.items():
            journal.append(key, rows)
    part = (whole / "x.part").read_bytes()
    write_journal(whole / "x")
    for length in range(len(part) + 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "x.part").write_bytes(part[:length])
        write_journal(folder / "x")
        assert files(folder) == files(whole)


def test_a_kill_between_the_steps_of_sealing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    write_journal(whole / "x")

    class Killed(Exception):
        pass

    def killed(*args: object) -> None:
        raise Killed

    for step, target in enumerate(("isheep.artifacts.write_atomic", "isheep.artifacts.Journal.close")):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if step == 0:  # after the rows, before the seal
                patch.setattr(target, lambda path, data: killed() if path.suffix else write_atomic(path, data))
            else:  # after the seal, before the .part is removed
                patch.setattr(target, killed)
            write_journal(folder / "x")
        assert "x.part" in files(folder)
        write_journal(folder / "x")
        assert files(folder) == files(whole)


def test_sigkill_in_the_middle_of_appending_loses_nothing_that_was_returned(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from isheep.artifacts import Journal
        journal = Journal(Path(sys.argv[1]), {})
        for number in range(100):
            journal.append(str(number), [{"number": number}])
            if number == 57:
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], cwd=root)
    assert result.returncode == -9
    with Journal(tmp_path / "x", {}) as journal:
        assert list(journal.done) == [str(number) for number in range(58)]


def test_other_settings_or_inputs_are_named(tmp_path: Path) -> None:
    path, source = tmp_path / "x", tmp_path / "seeds.jsonl"
    source.write_text("one")
    with Journal(path, {"answer": {"top_p": 0.95}, "seed": 0}, {"seeds": source}) as journal:
        journal.append("a", [])
    for sealed in (False, True):
        with pytest.raises(UserError, match=r"settings\.answer\.top_p \(0\.95, now 0\.5\).*choose another --out"):
            Journal(path, {"answer": {"top_p": 0.5}, "seed": 0}, {"seeds": source})
        source.write_text("two")
        with pytest.raises(UserError, match=r"other inputs\.seeds:"):
            Journal(path, {"answer": {"top_p": 0.95}, "seed": 0}, {"seeds": source})
        source.write_text("one")
        with Journal(path, {"answer": {"top_p": 0.95}, "seed": 0}, {"seeds": source}) as journal:
            if not sealed:
                journal.seal(["a"])


def test_a_changed_or_missing_sealed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_journal(path)
    path.write_bytes(path.read_bytes().replace(b"b2", b"b9"))
    with pytest.raises(UserError, match="is not what was sealed"):
        write_journal(path)
    path.unlink()
    with pytest.raises(UserError, match="is not what was sealed"):
        write_journal(path)


def test_a_file_without_its_seal_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with pytest.raises(UserError, match="without its seal"):
        write_journal(path)
    assert path.read_text() == "mine"


def test_a_damaged_part_is_a_users_matter(tmp_path: Path) -> None:
    (tmp_path / "x.part").write_text("{broken\n")
    with pytest.raises(UserError, match=r"x\.part is damaged.*delete it"):
        write_journal(tmp_path / "x")


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "x", SETTINGS), pytest.raises(UserError, match="another process"):
        Journal(tmp_path / "x", SETTINGS)
    write_journal(tmp_path / "x")


def test_misuse_is_an_assertion(tmp_path: Path) -> None:
    with Journal(tmp_path / "x", SETTINGS) as journal:
        journal.append("a", [])
        with pytest.raises(AssertionError, match="twice"):
            journal.append("a", [])
        with pytest.raises(AssertionError, match="not sealed yet"):
            journal.rows()
        with pytest.raises(AssertionError, match="twice in the order"):
            journal.seal(["a", "a"])


def test_a_full_disk_while_appending_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with Journal(path, SETTINGS) as journal:
        journal.append("b", ROWS["b"])
        size = journal.part.stat().st_size
        with small_disk(size + 10), pytest.raises(UserError, match=r"no space left to write .*x\.part"):
            journal.append("c", ROWS["c"])
        assert journal.part.stat().st_size == size
        journal.append("a", [])  # space was made: the same journal goes on
    write_journal(path)
    write_journal(tmp_path / "whole" / "x")
    assert path.read_bytes() == (tmp_path / "whole" / "x").read_bytes()


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    write_atomic(path, "old")
    with small_disk(100), pytest.raises(UserError, match=r"no space left to write .*config\.toml"):
        write_atomic(path, "x" * 1000)
    assert files(tmp_path) == {"config.toml": b"old"}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*file.inner.*choose another place"):
        write_atomic(tmp_path / "file" / "inner", "x")
    with pytest.raises(UserError, match=r"cannot use .*file.x"):
        Journal(tmp_path / "file" / "x", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"permission denied.*choose another place"):
        write_atomic(tmp_path / "x", "")


def test_canonical_json() -> None:
    assert canonical_json({"b": (1,), "a": "é\u2028"}) == '{"a": "é\u2028", "b": [1]}'
    lone = "\ud83d"
    assert json.loads(canonical_json([lone]).encode()) == [lone]
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("content", "num_rows", "num_bad"),
    [
        (b'[{"a": 1}, {"a": 2}]', 2, 0),
        (b'\xef\xbb\xbf [{"a": 1}, 3, null]', 1, 2),
        (b'{"a": 1}\r\n\r\n{"a": 2}', 2, 0),
        (b'{"a": 1}\n{"a": \n["x"]\n\xff\n{"a": NaN}\n', 1, 4),
        ('{"a": "x\u2028y\x85z"}\n'.encode(), 1, 0),
        (b'{"a": ' + b"[" * 100_000 + b'\n{"a": 1}', 1, 1),
    ],
)
def test_read_rows(tmp_path: Path, content: bytes, num_rows: int, num_bad: int) -> None:
    file = tmp_path / "rows"
    file.write_bytes(content)
    rows, bad = read_rows(file)
    assert (len(rows), bad) == (num_rows, num_bad)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is empty"),
        (b"\n \n", "it is empty"),
        (b"[]", "it is empty"),
        (b"[1, 2]", "none of its 2 rows"),
        (b"hello\nworld\n", "none of its 2 rows"),
        (b'[{"a": 1},', "is not a JSON array"),
        (b'[{"a": 1}] x', "is not a JSON array"),
        (b"[\xff]", "is not a JSON array"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "rows"
    file.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_rows(file)


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*absent: no such file"):
        read_rows(tmp_path / "absent")
    with pytest.raises(UserError, match="is a directory"):
        read_rows(tmp_path)
