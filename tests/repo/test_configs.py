"""Every file of configs/ loads, and each preset fits the model and the template it names."""

import json
from pathlib import Path

import pytest

from isheep.config import RunConfig, load_config, model_presets
from isheep.model.config import ModelConfig
from isheep.text.templates import TEMPLATES, template

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "../shared/data/model_configs/table.json"
RUNS = [p for p in sorted((ROOT / "configs").rglob("*.toml")) if p.parent.name not in ("models", "recipes")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_run_config_loads(path: Path) -> None:
    load_config(RunConfig, {"model": "smollm2-135m", "out": "runs/x"}, path)


@pytest.mark.parametrize("name", model_presets())
def test_a_preset_fits_model_and_template(name: str) -> None:
    preset = model_presets()[name]
    ModelConfig.from_dict(preset.architecture)
    assert preset.template in TEMPLATES
    assert set(template(preset.template).stop) <= set(preset.stop)


@pytest.mark.skipif(not TABLE.exists(), reason="the table of published configurations is not here")
def test_presets_hold_the_published_values() -> None:
    table = json.loads(TABLE.read_text())
    for published, values in table.items():
        preset = model_presets()[published.lower().removeprefix("meta-")]
        assert preset.source.endswith(f"/{published}")
        wrong = {key: value for key, value in preset.architecture.items() if value != values[key]}
        assert wrong == {}, published
