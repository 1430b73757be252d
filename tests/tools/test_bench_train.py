import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "bench_train.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))  # as when it is run as a script
    import bench_train

    return bench_train


def test_a_contest_with_peft_on_random_weights_comes_to_its_table():
    pytest.importorskip("peft")
    shape = "--random smollm2-135m --layers 1 --rows 2 --min-len 5 --row-len 12 --prompt-len 3"
    command = [sys.executable, str(TOOL), *shape.split(), "--rounds", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    checks, _, _, ours, theirs = done.stdout.splitlines()
    assert checks.startswith("checks: isheep ") and ours.startswith("| isheep |") and theirs.startswith("| peft |")


def test_a_slice_is_the_first_layers_of_a_preset(tool):
    whole, cut = (tool.architecture(Namespace(random="qwen1.5-72b", layers=n)) for n in (None, 8))
    assert whole["num_hidden_layers"] == 80
    assert cut == whole | {"num_hidden_layers": 8}
    with pytest.raises(SystemExit, match="no-such-model: there is no such file"):
        tool.architecture(Namespace(random="no-such-model", layers=None))


@pytest.mark.parametrize("prompt_len", [0, 2])
def test_packed_rows_are_the_padded_ones_without_padding(tool, prompt_len):
    rows = [[11, 12, 13], [21, 22, 23, 24, 25]]
    padded, packed = tool.padded(rows, prompt_len), tool.packed(rows, prompt_len)
    kept = padded["attention_mask"].bool()
    assert kept.sum(1).tolist() == [3, 5]
    assert packed["input_ids"].tolist() == [padded["input_ids"][kept].tolist()]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    predicted = [labels[1:][labels[1:] != -100].tolist() for labels in padded["labels"]]
    assert packed["labels"][packed["labels"] != -100].tolist() == [*predicted[0], *predicted[1]]
    assert (padded["labels"][~kept] == -100).all()


def test_random_weights_follow_from_their_names_alone(tool):
    makers = {
        "embed": lambda: torch.nn.Embedding(50, 400),
        "proj": lambda: torch.nn.Linear(400, 30),
        "norm": lambda: torch.nn.RMSNorm(400),
    }
    one, other = (
        torch.nn.ModuleDict({name: makers[name]() for name in names}) for names in (makers, list(makers)[::-1])
    )
    tool.fill(one)
    tool.fill(other)
    weights = one.state_dict()
    assert weights.keys() == other.state_dict().keys()
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in weights.items())
    assert weights["embed.weight"].std().item() == pytest.approx(3 / 20, rel=0.05)
    assert weights["proj.weight"].std().item() == pytest.approx(1 / 20, rel=0.05)
    assert (weights["norm.weight"] == 1).all() and (weights["proj.bias"] == 0).all()
