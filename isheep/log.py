"""What a person and a script see of a run: one logger, progress on stderr, and events.jsonl.

Results never go through here: they are files. tqdm is used where it is installed and stderr is a terminal.
"""

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from isheep.artifacts import canonical_json, writes_to

try:
    from tqdm import tqdm
except ImportError:  # the bar is a comfort, not a need
    tqdm = None

log = logging.getLogger("isheep")

PERIOD_S = 10.0  # between two progress lines where there is no bar


class _BarSafeHandler(logging.StreamHandler):
    """Writes to the stderr of the moment, above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if tqdm is None or not sys.stderr.isatty():
            self.stream = sys.stderr
            super().emit(record)
        else:
            tqdm.write(self.format(record), file=sys.stderr)


def setup(verbose: bool = False, quiet: bool = False) -> None:
    """Send this project's log to stderr with the time of day; a second call changes the level only.

    `quiet`: warnings alone, as of a rank that follows another.
    """
    if not any(isinstance(handler, _BarSafeHandler) for handler in log.handlers):
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


class Events:
    """Appends {"event", "time_s", ...} rows to a run's events.jsonl. `time_s` counts from the epoch.

    Several runs of one folder append to one file: it tells when the run was stopped and started again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """One flushed line; `fields` are plain values."""
        row = {"event": event, "time_s": round(time.time(), 3), **fields}
        with writes_to(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(canonical_json(row) + "\n")


class Progress:
    """A progress bar on a terminal; elsewhere a log line about every ten seconds and one at the end.

    with Progress("answer", total=10_000) as bar:
        bar.update(3, prefill="900 tok/s", decode="510 tok/s")
    """

    def __init__(self, desc: str, total: int | None = None, unit: str = "rows") -> None:
        self.desc, self.total, self.unit = desc, total, unit
        self.n = 0
        self._postfix: dict[str, Any] = {}
        self._start = self._last = time.monotonic()
        shows_bar = tqdm is not None and sys.stderr.isatty()
        self._bar = tqdm(desc=desc, total=total, unit=f" {unit}", dynamic_ncols=True) if shows_bar else None

    def update(self, n: int = 1, **postfix: Any) -> None:
        """`n` more are done; `postfix` are the numbers worth watching now."""
        self.n += n
        self._postfix = postfix or self._postfix
        if self._bar is not None:
            self._bar.set_postfix(self._postfix, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last >= PERIOD_S:
            self._last = time.monotonic()
            log.info(self._line())

    def _line(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        extra = "".join(f", {key} {value}" for key, value in self._postfix.items())
        return f"{self.desc}: {self.n}{of} {self.unit}, {self.n / elapsed:.1f}/s{extra}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.n:
            log.info(self._line())
