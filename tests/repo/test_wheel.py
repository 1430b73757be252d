"""An installed wheel works from any folder: its modules, presets, seeds and kernels are all in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("isheep", "kernels", "configs", "seeds", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

PROGRAM = """
import json, isheep, isheep.config, isheep_kernels
print(json.dumps({
    "where": isheep.__file__,
    "presets": len(isheep.config.model_presets()),
    "demo": isheep.config.data_path("configs", "demo.toml").is_file(),
    "seeds": str(isheep.config.data_path("seeds", "seed_tasks.jsonl")),
    "kernels": list(isheep_kernels.__path__)[0],
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, built from a copy so that no build/ is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.exists():
            shutil.copy(source, folder / "copy" / name)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "copy")]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("isheep-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_presets_seeds_and_kernels_are_found_from_another_folder(site: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout)
    assert Path(found["where"]).is_relative_to(site)
    assert Path(found["kernels"]).is_relative_to(site)
    assert found["presets"] == len(list((ROOT / "configs/models").glob("*.toml")))
    assert Path(found["seeds"]).is_relative_to(site)
    assert found["demo"] == (ROOT / "configs/demo.toml").is_file()
    assert len(Path(found["seeds"]).read_bytes().splitlines()) == 175


@pytest.mark.parametrize(("folder", "package"), [("isheep", "isheep"), ("kernels", "isheep_kernels")])
def test_every_source_file_is_in_the_wheel(site: Path, folder: str, package: str) -> None:
    """A package that pyproject.toml forgets would be missing here."""
    sources = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".cpp"}}
    installed = {path.relative_to(site / package) for path in (site / package).rglob("*") if path.is_file()}
    assert sources - installed == set()
