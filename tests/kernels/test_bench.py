import csv
import re
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from isheep_kernels import bench, cases, rivals
from isheep_kernels.bench import CHIPS, Band, Row, in_turns, is_right, main, ready
from isheep_kernels.cases import GOALS, MODELS, OPS, Case, Model, outputs
from isheep_kernels.compiled import ops

SMALL = Model(hidden=48, inner=80, heads=4, kv_heads=2, head_dim=16, vocabulary=70)
NOT_ON_A_CPU = {"cuDNN", "varlen_attn"}  # nor FlexAttention's backward
# Once torch's compiler has failed on it, every Python call of the process holds its arguments until it returns, which
# tests of memory would see.
FLEX = pytest.mark.alone


@pytest.fixture
def small(monkeypatch):
    """The cases on the CPU, in the interpreter, which can do fp16 but not bf16. torch's compiler traces and stops."""
    values = {
        "TRAIN": 37,
        "DECODE": 3,
        "RANK": 5,
        "LENGTHS": (9, 40),
        "MIX": (5, 30),
        "BATCHES": (3,),
        "CONTEXTS": (48,),
    }
    for name, value in (values | {"DEVICE": "cpu", "DTYPE": torch.float16}).items():
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(rivals, "CHUNK", 16)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)


@pytest.fixture
def rehearsed(small, monkeypatch):
    """`main` as on a GPU, with the model SMALL alone and few rounds; times are of the interpreter and mean nothing."""

    def seconds(function):
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    monkeypatch.setattr(bench, "this_chip", lambda _: (CHIPS["h200"], bench.measured))
    monkeypatch.setattr(bench, "gpu_seconds", seconds)
    monkeypatch.setattr(bench, "in_turns", partial(in_turns, rounds=2))
    monkeypatch.setattr(bench, "MODELS", {"qwen1.5-7b": SMALL})
    monkeypatch.setattr(cases, "LENGTHS", (9,))
    bench.leave_out.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_each_case_is_checked_against_its_definition(op, small):
    for case in OPS[op]("small", SMALL):
        inputs = case.inputs()
        assert case.op == op and is_right(case, inputs), case.shape
        wrong = case._replace(ours=lambda case=case, **given: [y * 1.5 for y in outputs(case.ours(**given))])
        assert not is_right(wrong, inputs), case.shape


def test_every_op_with_a_kernel_has_cases_a_test_and_a_row():
    tests, kernels = Path(__file__).parent, Path(bench.__file__).parent
    rows = re.findall(r"^\| `(\w+)`", (kernels / "README.md").read_text(), re.MULTILINE)
    parts = {"attention_hopper": "attention_packed", "lora_hopper": "lora_matmul"}  # one chip's kernels of an op
    parts["attention_hopper_backward"] = "attention_packed"
    for module in ops():
        file = tests / f"test_{module.removesuffix('_backward')}.py"
        assert parts.get(module, module) in rows and file.exists()
    assert set(OPS) == {parts.get(module, module) for module in ops()}


def alone(case: Case) -> list[str]:
    """Rivals that do only part of the work."""
    return [name for name in case.rivals if name.endswith("alone")]


@pytest.mark.parametrize("op", [pytest.param(op, marks=FLEX if op == "attention_packed" else ()) for op in OPS])
def test_every_rival_that_runs_here_does_the_same_work(op, small):
    ran, left_out = set(), set()
    for case in OPS[op]("small", SMALL):
        inputs = case.inputs()
        for name in case.rivals.keys() - alone(case):
            if bench.runs(case, name, inputs):
                ran.add(name)
                theirs, wanted = (ready(case, f, inputs)() for f in (case.rivals[name], case.reference))
                for got, want in zip(theirs, wanted, strict=True):  # not all are as exact as is asked of ours
                    assert (got - want).abs().max() <= 0.01 * want.abs().max(), (case.shape, name)
            else:
                left_out.add(f"{name}, {case.passes}")
        bench.release()
    missing = {name for name in left_out if not name.startswith("FlexAttention, both")}
    assert ran and {name.split(",")[0] for name in missing} == (NOT_ON_A_CPU if op == "attention_packed" else set())


def test_products_alone_are_all_that_the_base_does(small):
    layer, back = list(cases.lora_matmul_cases("small", SMALL))[:2]
    inputs = layer.inputs()
    ys = layer.rivals["base products alone"](**inputs)
    names = [name for group in cases.READERS for name in group]
    xs = [inputs[f"x_{group[0]}"] for group in cases.READERS for _ in group]
    for x, y, name in zip(xs, ys, names, strict=True):
        assert torch.equal(y, x @ inputs[f"w_{name}"].t())
    inputs = back.inputs()
    gradients = ready(back, back.rivals["base products alone"], inputs)()
    assert torch.equal(gradients[0], inputs["dys"][0] @ inputs["w_q"]) and gradients[-1] is None


def test_linears_that_read_the_same_x_share_its_pass(small, monkeypatch):
    passes = []
    monkeypatch.setattr(cases, "lora_matmuls", lambda x, projections: passes.append((x, projections)) or [x])
    layer = next(cases.lora_matmul_cases("small", SMALL))
    layer.ours(**layer.inputs())
    assert [len(projections) for _, projections in passes] == [3, 1, 2, 1]
    assert all(p.w.shape[1] == x.shape[1] for x, projections in passes for p in projections)


def test_a_backward_pass_is_timed_without_its_forward(small):
    case = next(case for case in OPS["swiglu"]("small", SMALL) if case.passes == "both")
    calls = []
    watched = case._replace(ours=lambda **given: calls.append(given) or case.ours(**given))
    inputs = case.inputs()
    both = ready(watched, watched.ours, inputs)
    assert not calls and len(both()) == 3 and len(calls) == 1
    alone = ready(watched._replace(passes="backward"), watched.ours, inputs)
    assert len(calls) == 2 and len(alone()) == 2 and len(calls) == 2


def test_both_forms_of_a_linear_are_right(small, monkeypatch):
    monkeypatch.setattr(cases, "TRAIN", 70)  # more than few rows, of which there is one form
    case = next(cases.lora_linear_cases("small", 70, 48, 64))
    inputs, wanted = case.inputs(), []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: wanted.append(x) or (x @ w.t()))
    for form, products in (("one kernel", 0), ("library product and a pass", 1)):
        wanted.clear()
        case.rivals[form](**inputs)
        assert len(wanted) == products
        assert is_right(case._replace(ours=case.rivals[form]), inputs)


def test_counts_of_a_linear_and_of_a_layer():
    layer, _, linear, *_ = cases.lora_matmul_cases("qwen1.5-7b", MODELS["qwen1.5-7b"])
    assert linear.flops == 2 * 8192 * 4096 * 4096 + 2 * 8192 * 16 * (4096 + 4096)
    assert linear.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096) + 4 * 16 * (4096 + 4096)
    assert bench.limit(linear, CHIPS["h200"]) == linear.flops / 989e12
    C, inner = 4096, 11008
    assert layer.flops == 2 * 8192 * (4 * C * C + 3 * C * inner + 16 * (4 * 2 * C + 3 * (C + inner)))
    read_and_written = 8192 * (3 * C + inner) + 8192 * (5 * C + 2 * inner)
    assert layer.bytes == 2 * (read_and_written + 4 * C * C + 3 * C * inner) + 4 * 16 * (4 * 2 * C + 3 * (C + inner))


def test_every_goal_has_rows_that_can_show_it():
    asked = {name: [] for name in GOALS}
    for op, make in OPS.items():
        for case in (case for name, model in MODELS.items() for case in make(name, model)):
            columns = {"of the limit"} | {f"{rival} / ours" for rival in case.rivals}
            assert case.op == op and (not case.goal or GOALS[case.goal].column in columns)
            asked.get(case.goal, []).append(case)
    assert all(asked.values())
    far = [case.shape for case in asked["attention forward, 128 wide, 2k to 16k"]]
    assert {shape.split()[1].split("×")[1] for shape in far} == {"2048", "4096", "8192", "16384"}
    decoding = [case.shape.split()[1:4:2] for case in asked["paged decoding, of stream"]]
    assert {int(batch) for batch, _ in decoding} == {32, 128, 512}
    assert {int(rest.split("×")[0]) for _, rest in decoding} == {512, 2048, 8192}


def test_functions_are_timed_in_turns():
    calls = []

    def clock(name):
        calls.append(name)
        return float(len(calls))

    times = in_turns({name: partial(clock, name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abc" + "cba" + "abc"
    assert times == {"a": [6.0, 7.0], "b": [5.0, 8.0], "c": [4.0, 9.0]}


def test_a_band_holds_the_middle_of_its_ratios():
    assert str(Band.of(range(1, 12))) == "6.000 (3.000–9.000)"


def test_goals_are_held_against_the_rows_that_are_theirs(capsys):
    name = "linear cross-entropy"
    ratios = [Band(0.9, 0.8, 1.0), Band(0.7, 0.6, 0.8), Band(0.8, 0.7, 0.9), "left out"]
    rows: list[Row] = [{"goal": name, "products alone / ours": ratio} for ratio in ratios]
    bench.print_goals([*rows, {"goal": "", "products alone / ours": Band(9, 9, 9)}])
    printed = capsys.readouterr().out
    assert f"| {name} | products alone / ours | 0.800 | 0.800 | 0.700 | 3 |" in printed
    assert printed.count("not measured") == len(GOALS) - 1


def test_without_a_gpu_limits_are_printed_and_called_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "swiglu", "--chip", "a100", "--csv", str(tmp_path / "rows.csv")])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "nothing is measured" in printed and "312 TFLOP/s, 2.04 TB/s" in printed
    assert printed.count("not measured") == len(GOALS)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 2 * len(MODELS)  # and both passes


def test_on_a_gpu_limits_are_of_what_it_does_now(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "such a thing")
    monkeypatch.setattr(bench, "ceilings", lambda: bench.Chip(700e12, 4e12))
    assert bench.this_chip("h100") == (bench.Chip(700e12, 4e12), bench.measured)
    assert re.match(r"such a thing, torch .*, this run: 700 TFLOP/s, 4.00 TB/s\n", capsys.readouterr().out)


def test_ceilings_are_the_product_and_the_faster_stream(monkeypatch):
    took = {"mm": 2.0, "clone": 4.0, "sum": 1.0}
    monkeypatch.setattr(bench, "randn", lambda *shape: torch.empty(0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.empty(250))
    monkeypatch.setattr(bench, "gpu_seconds", lambda call: took[getattr(call, "func", call).__name__])
    assert bench.ceilings() == bench.Chip(2 * 8192**3 / 2.0, 1000.0)  # read once in a second, moved twice in four


@FLEX
def test_a_run_on_a_gpu_rehearsed(rehearsed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cases, "lora_linear_cases", lambda *_: iter(()))  # all is in the layer's, and this is slow
    monkeypatch.setattr(sys, "argv", ["bench", "attention_packed", "lora_matmul", "--csv", str(tmp_path / "rows.csv")])
    assert main() == 0
    printed = capsys.readouterr()
    for name in NOT_ON_A_CPU:
        assert len(re.findall(f"^attention_packed: {name} is left out: \\w+: .+$", printed.err, re.MULTILINE)) >= 1
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    layer = next(row for row in rows if "all linears" in row["shape"])
    for rival in ("base products alone", "eager", "torch.compile", "PEFT", "PEFT, torch.compile"):
        assert re.fullmatch(r"[\d.]+ \([\d.]+–[\d.]+\)", layer[f"{rival} / ours"])
    assert next(row for row in rows if row["op"] == "attention_packed")["cuDNN / ours"] == "left out"
    assert re.search(r"^\| LoRA layer of qwen1.5-7b, backward \|.* \| 1 \|$", printed.out, re.MULTILINE)


def test_a_rival_that_does_not_run_says_why_once(small, capsys):
    def absent(**inputs):
        raise ModuleNotFoundError("No module named 'peft'\nand more")

    bench.leave_out.cache_clear()
    case = next(iter(OPS["swiglu"]("small", SMALL)))._replace(rivals={"PEFT": absent})
    assert not bench.runs(case, "PEFT", case.inputs()) and not bench.runs(case, "PEFT", case.inputs())
    assert capsys.readouterr().err == "swiglu: PEFT is left out: ModuleNotFoundError: No module named 'peft'\n"


def test_what_is_wrong_is_not_timed(rehearsed, monkeypatch, capsys):
    def wrong(name, model):
        inputs = {"x": torch.ones(3, requires_grad=False)}
        yield Case("rope", name, 1, 1, lambda: inputs, lambda x: x + 1, lambda x: x, {})

    monkeypatch.setitem(OPS, "rope", wrong)
    monkeypatch.setattr(sys, "argv", ["bench", "rope"])
    assert main() == 1
    assert "rope qwen1.5-7b is wrong: it is not timed" in capsys.readouterr().err
