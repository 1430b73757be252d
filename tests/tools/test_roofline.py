import csv
import sys
from pathlib import Path

import pytest

from isheep_kernels import bench
from isheep_kernels.bench import CHIPS
from tools import roofline


def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *ops: str) -> list[dict[str, str]]:
    """As bench writes them without a GPU."""
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["bench", *ops, "--models", "qwen1.5-7b", "--chip", "a100", "--csv", str(path)])
    assert bench.main() == 0
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_limit_is_the_chip_s_and_what_is_not_measured_lies_on_it(tmp_path, monkeypatch):
    found = roofline.read(rows(tmp_path, monkeypatch, "swiglu", "linear_cross_entropy"))
    assert found.peak == pytest.approx(CHIPS["a100"].flops, rel=1e-3)
    assert found.bandwidth == pytest.approx(CHIPS["a100"].bytes, rel=1e-3)
    assert not found.measured and set(found.points) == {"swiglu", "linear_cross_entropy"}
    for intensity, speed in (point for points in found.points.values() for point in points):
        assert speed == pytest.approx(min(found.peak, intensity * found.bandwidth), rel=0.02)


def test_what_is_measured_lies_where_it_was_seen(tmp_path, monkeypatch):
    half = rows(tmp_path, monkeypatch, "swiglu", "linear_cross_entropy")
    for row in half:
        row["ours µs"] = str(2 * float(row["limit µs"]))
    found = roofline.read(half)
    assert found.measured
    intensity, speed = found.points["swiglu"][0]
    assert intensity == pytest.approx(5 / 6, rel=0.01) and speed == pytest.approx(intensity * 2.04e12 / 2, rel=0.01)


def test_one_kind_of_limit_makes_no_picture(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no row is bound by arithmetic"):
        roofline.read(rows(tmp_path, monkeypatch, "swiglu"))


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason='the extra "plots" is not installed')
    drawn = roofline.read(rows(tmp_path, monkeypatch, "swiglu", "linear_cross_entropy"))
    roofline.draw(drawn, tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    assert picture.startswith("<?xml") and len(picture) > 10_000
