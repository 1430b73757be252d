import re
import sys
from pathlib import Path

import pytest
import torch

from isheep_kernels import bench
from isheep_kernels.bench import Case, Model, in_turns, is_right, main
from isheep_kernels.compiled import ops

SMALL = Model(hidden=48, inner=80, heads=4, kv_heads=2, head_dim=16, vocabulary=70)


@pytest.fixture
def small(monkeypatch):
    """The cases on the CPU, in the interpreter, which can do fp16 but not bf16."""
    values = {"TRAIN": 37, "DECODE": 3, "RANK": 5, "LENGTHS": (40,), "MIX": (5, 30), "BATCHES": (3,), "CONTEXTS": (48,)}
    for name, value in (values | {"DEVICE": "cpu", "DTYPE": torch.float16}).items():
        monkeypatch.setattr(bench, name, value)
    torch.manual_seed(0)


@pytest.mark.parametrize("op", bench.OPS)
def test_each_case_is_checked_against_its_definition(op, small):
    for case in bench.OPS[op]("small", SMALL):
        inputs = case.inputs()
        assert case.op == op and is_right(case, inputs), case.shape
        wrong = case._replace(ours=lambda case=case, **given: [y * 1.5 for y in bench.outputs(case.ours(**given))])
        assert not is_right(wrong, inputs), case.shape


def test_every_op_with_a_kernel_has_cases_a_test_and_a_row():
    tests, kernels = Path(__file__).parent, Path(bench.__file__).parent
    rows = re.findall(r"^\| `(\w+)`", (kernels / "README.md").read_text(), re.MULTILINE)
    for op in ops():
        assert op in bench.OPS and op in rows and (tests / f"test_{op}.py").exists()
    assert set(bench.OPS) == set(ops())


def test_both_forms_of_a_lora_layer_are_right(small, monkeypatch):
    monkeypatch.setattr(bench, "TRAIN", 70)  # more than few rows, of which there is one form
    case = next(bench.lora_matmul_cases("small", SMALL))
    inputs, wanted = case.inputs(), []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: wanted.append(x) or (x @ w.t()))
    for form, products in (("one kernel", 0), ("library product and a pass", 1)):
        wanted.clear()
        case.rivals[form](**inputs)
        assert len(wanted) == products
        assert is_right(case._replace(ours=case.rivals[form]), inputs)


def test_counts_of_a_lora_layer():
    case = next(bench.lora_matmul_cases("qwen1.5-7b", bench.MODELS["qwen1.5-7b"]))
    assert case.flops == 2 * 8192 * 4096 * 4096 + 2 * 8192 * 16 * (4096 + 4096)
    assert case.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096) + 4 * 16 * (4096 + 4096)
    assert bench.limit(case, bench.CHIPS["h200"]) == case.flops / 989e12


def test_functions_are_timed_in_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}

    def seconds(function):
        function()
        return float(len(calls))

    times = in_turns(functions, seconds, rounds=2)
    assert "".join(calls) == "abc" + "cba" + "abc"
    assert times == {"a": [6.0, 7.0], "b": [5.0, 8.0], "c": [4.0, 9.0]}


def test_without_a_gpu_limits_are_printed_and_called_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "swiglu", "--chip", "a100", "--csv", str(tmp_path / "rows.csv")])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "nothing is measured" in printed and "312 TFLOP/s, 2.04 TB/s" in printed
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 2 * len(bench.MODELS)  # with backward


def test_what_is_wrong_is_not_timed(monkeypatch, capsys, small):
    def cases(name, model):
        inputs = {"x": torch.ones(3, requires_grad=False)}
        yield Case("rope", name, 1, 1, lambda: inputs, lambda x: x + 1, lambda x: x, {})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no such thing")
    monkeypatch.setattr(bench, "ceilings", lambda: bench.CHIPS["h200"])
    monkeypatch.setitem(bench.OPS, "rope", cases)
    monkeypatch.setattr(sys, "argv", ["bench", "rope"])
    assert main() == 1
    assert "is wrong: nothing is timed" in capsys.readouterr().err
