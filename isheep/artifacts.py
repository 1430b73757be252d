"""The files of a run: whole or not at all, append-only while they grow, sealed when they are done.

A stage's `Journal` survives a kill at any moment. While the stage works, finished records are appended to
`<path>.part`. `seal` writes `<path>` in the order of the input, then `<path>.seal` with the number of rows, the sha256
of the bytes and the fingerprint of everything the result depends on. Started again, the stage goes on from the .part,
or finds the seal and does nothing. The sealed bytes do not depend on where it was stopped.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from isheep.loading import UserError, diff

log = logging.getLogger("isheep")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST)


def os_error_sentence(error: OSError, path: Path | str | None = None) -> str | None:
    """One sentence for a full disk or a place that cannot be written or read; None for any other failure."""
    where = path or error.filename or "the output"
    if error.errno in FULL:
        return f"no space left to write {where}: free some, then start the same command again; it goes on from there."
    if error.errno in REFUSED:
        return (
            f"cannot use {where} ({os.strerror(error.errno).lower()}): choose another place, or mend its permissions."
        )
    return None


@contextmanager
def writes_to(path: Path) -> Iterator[None]:
    """Turns a full disk or an unwritable place into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        sentence = os_error_sentence(error, path)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file: a reader, or the next start after a kill, sees all of it or the one before."""
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp")  # no pid in it: what a kill leaves is taken up the next time
    with writes_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(obj: Any) -> str:
    """The one text of a plain value: sorted keys, text as it is, no NaN; a lone surrogate stays an escape."""
    text = json.dumps(obj, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """A user's JSON array or JSONL file -> its objects, and how many rows were skipped as bad.

    Raises UserError where the file cannot be read or holds no object at all.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"cannot read {path}: {os.strerror(error.errno or 0).lower()}.") from error
    try:
        values = _array(content) if content.lstrip().startswith(b"[") else _lines(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON array ({error}): mend it, or write one JSON object per line.") from error
    rows = [value for value in values if isinstance(value, dict)]
    if not rows:
        found = f"none of its {len(values)} rows is a JSON object" if values else "it is empty"
        raise UserError(f"{path} has no usable row, {found}: give a JSON array of objects, or one object per line.")
    return rows, len(values) - len(rows)


def _array(content: bytes) -> list[Any]:
    values = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    assert isinstance(values, list)  # it starts with "["
    return values


def _lines(content: bytes) -> list[Any]:
    """One value per line that is not blank; None where the line is no JSON."""
    values: list[Any] = []
    for line in content.split(b"\n"):  # a row may hold U+2028 or \x85: only \n ends it
        if line.strip():
            try:
                values.append(json.loads(line.decode("utf-8"), parse_constant=_no_constant))
            except (ValueError, RecursionError):
                values.append(None)
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def adopt(seal: Path, others: Iterable[Path], names: Sequence[str], same: Callable[[Any], bool]) -> bool:
    """Take a result that another run has sealed, the files `names` and then `seal`, where `same` says it is ours.

    `others` are the folders where such a seal may lie. Tensors are linked where the disk can, texts are copied.
    """
    for folder in others:
        try:
            found = same(json.loads((folder / seal.name).read_bytes()))
        except (OSError, ValueError):
            continue
        if found and all((folder / name).is_file() for name in names):
            for name in (*names, seal.name):  # a kill in between leaves no seal, and all is taken anew
                _take(folder / name, seal.parent / name)
            log.info("%s: the same as in %s, taken from there", seal, folder)
            return True
    return False


def _take(source: Path, target: Path) -> None:
    """No file of tensors is ever written to in place, so two names may be one file; with any other one cannot know."""
    with writes_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
    if source.suffix == ".safetensors":
        with suppress(OSError):
            os.link(source, target)
            return
    write_atomic(target, source.read_bytes())


class Journal:
    """One stage's append-only results: `<path>.part` while it grows, `<path>` and `<path>.seal` when done.

    `settings` are the plain values that the result depends on, `inputs` the files (by a short name) whose bytes count.
    If what is on disk was made with others, that is a UserError naming them: a file is never silently redone.
    `done` maps each key to its rows so far; it is empty once sealed, where `rows()` has the result.
    A result that is not begun is taken from the first of `others`, folders of other runs, where the same is sealed,
    with the files of `beside`, which were written with it.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Path] | None = None,
        others: Iterable[Path] = (),
        beside: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.seal_path = path.with_name(path.name + ".seal")
        hashes = {name: sha256_file(file) for name, file in (inputs or {}).items()}
        self._fingerprint = json.loads(canonical_json({"settings": settings, "inputs": hashes}))
        self._rows: list[dict[str, Any]] = []
        self._file: Any = None
        self.done: dict[str, list[dict[str, Any]]] = {}
        self.sealed = self.seal_path.exists()
        if not self.sealed and not self.part.exists():
            self.sealed = adopt(self.seal_path, others, (*beside, path.name), self._is_mine)
        if self.sealed:
            self._rows = self._read_sealed()
            self.part.unlink(missing_ok=True)  # the kill came between the seal and this
        else:
            self._open_part()

    def rows(self) -> list[dict[str, Any]]:
        """The final rows; only a sealed journal has them."""
        assert self.sealed, f"{self.path} is not sealed yet"
        return self._rows

    def append(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Add the finished rows of one record, as one line that a kill afterwards cannot lose."""
        assert not self.sealed and key not in self.done, f"{self.path}: {key!r} appended twice or after the seal"
        line = canonical_json({"key": key, "rows": rows})
        self._write_line(line)
        self.done[key] = json.loads(line)["rows"]  # just as the next start would read them

    def seal(self, order: Iterable[str]) -> list[dict[str, Any]]:
        """Write the rows of the keys in `order`, flattened, and seal them; other keys are dropped."""
        assert not self.sealed, f"{self.path} is sealed already"
        order = list(order)
        assert len(set(order)) == len(order), f"{self.path}: a key comes twice in the order"
        self._rows = [row for key in order for row in self.done[key]]
        content = "".join(canonical_json(row) + "\n" for row in self._rows).encode()
        seal = {"rows": len(self._rows), "sha256": hashlib.sha256(content).hexdigest(), **self._fingerprint}
        write_atomic(self.path, content)
        write_atomic(self.seal_path, json.dumps(seal, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        self.sealed = True
        self.close()
        self.part.unlink()
        self.done = {}
        return self._rows

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_sealed(self) -> list[dict[str, Any]]:
        try:
            seal = json.loads(self.seal_path.read_bytes())
        except ValueError as error:
            raise UserError(f"{self.seal_path} is damaged ({error}): delete it and {self.path.name}.") from error
        self._compare(seal, self.path)
        if not self.path.exists() or sha256_file(self.path) != seal["sha256"]:
            raise UserError(
                f"{self.path} is not what was sealed (missing or changed by hand): put it back, or delete it and "
                f"{self.seal_path.name} to make it again."
            )
        return [json.loads(line) for line in self.path.read_bytes().split(b"\n") if line]

    def _is_mine(self, seal: Mapping[str, Any]) -> bool:
        return all(seal.get(name) == value for name, value in self._fingerprint.items())

    def _compare(self, found: Mapping[str, Any], file: Path) -> None:
        """UserError when `found`, a seal or a .part header, was made from other settings or inputs."""
        theirs = {name: found.get(name, {}) for name in self._fingerprint}
        changed = diff(theirs, self._fingerprint)
        if changed:
            shown = ", ".join(_change(key, theirs, self._fingerprint) for key in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UserError(
                f"{file} was made with other {shown}{more}: choose another --out, restore them, or delete that file "
                f"{'and its .seal ' if file == self.path else ''}to make it again."
            )

    def _open_part(self) -> None:
        if self.path.exists() and not self.part.exists():
            raise UserError(f"{self.path} is there without its seal: delete it, move it away, or choose another --out.")
        with writes_to(self.part):
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.part.open("ab", buffering=0)  # a line is in the kernel's hands when append returns
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process ends
            self._read_part()
        except BlockingIOError as error:
            self.close()
            raise UserError(f"{self.part} is being written by another process: wait for it, or stop it.") from error
        except BaseException:
            self.close()
            raise

    def _read_part(self) -> None:
        """Take up what is in the .part, cutting off a line that a kill or a full disk tore."""
        content = self.part.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.warning("%s: cut off a torn last line of %d bytes", self.part, len(content) - whole)
            self._file.truncate(whole)
        lines = content[:whole].split(b"\n")[:-1]
        if not lines:
            self._write_line(canonical_json(self._fingerprint))
            return
        try:
            header, *records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise UserError(f"{self.part} is damaged ({error}): delete it to start this stage again.") from error
        self._compare(header, self.part)
        self.done = {record["key"]: record["rows"] for record in records}
        assert len(self.done) == len(records), f"{self.part}: a key comes twice"

    def _write_line(self, line: str) -> None:
        """All of the line or, where the disk is full, none of it."""
        rest = memoryview(line.encode() + b"\n")
        start = os.fstat(self._file.fileno()).st_size
        with writes_to(self.part):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(start)
                raise


def _change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'settings.temperature (1.0, now 0.5)'; for a file's hash, or a long value, the name alone."""
    left, right = _get(before, key), _get(now, key)
    if key.startswith("inputs.") or len(f"{left}{right}") > 60:
        return key
    return f"{key} ({left}, now {right})"


def _get(tree: Mapping[str, Any], dotted: str) -> Any:
    value: Any = tree
    for name in dotted.split("."):
        value = value.get(name, "absent") if isinstance(value, Mapping) else "absent"
    return value
