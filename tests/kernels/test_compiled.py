import os
import subprocess
import sys
from collections import Counter

import pytest
from triton import knobs

from isheep_kernels import compiled
from isheep_kernels.compiled import Compiled, compile_all, problems
from isheep_kernels.variant import Variant

pytestmark = pytest.mark.skipif(not os.path.exists(knobs.nvidia.ptxas.path), reason="Triton's compiler is not here")


def run(tmp_path, *args: str) -> subprocess.CompletedProcess:
    """In a process of its own: here kernels are interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "isheep_kernels.compiled", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_every_kernel_compiles_for_both_chips_and_ships_without_spills(tmp_path):
    done = run(tmp_path, "--first")
    assert done.returncode == 0, done.stderr
    rows = {tuple(line[:62].rsplit(maxsplit=1)): line[62:].split() for line in done.stdout.splitlines()[2:]}
    ampere, hopper = ({v.kernel for op in compiled.ops() for v in compiled.variants(op, chip)} for chip in (80, 90))
    assert len(rows) == len(ampere) + len(hopper) and len(ampere) >= 13 and len(hopper - ampere) == 3
    hmma, hgmma, ldgsts, utmaldg = 3, 4, 5, 6
    for product in ("lora_product many rows bias bf16", "linear_cross_entropy by hidden bf16"):
        ampere, hopper = rows[product, "sm_80"], rows[product, "sm_90"]
        assert int(ampere[hmma]) and int(ampere[ldgsts]) and int(hopper[hgmma]) and int(hopper[ldgsts])
    of_producers = [row for (name, _), row in rows.items() if "_hopper" in name]
    assert len(of_producers) == 3 and all(int(row[hgmma]) and int(row[utmaldg]) for row in of_producers)


def test_an_unknown_op_is_an_error(tmp_path):
    done = run(tmp_path, "rope", "softmax")
    assert done.returncode == 2 and "no op is called softmax; there are" in done.stderr


def made(chip=90, spilled=0, shared=0, **counts):
    variant = Variant("product", None, {}, {"BLOCK_M": 64}, 4, 3)
    return Compiled(variant, chip, 100, spilled, shared, Counter(counts))


def test_what_must_not_ship():
    assert problems(made(HGMMA=1, shared=227 * 1024)) == problems(made(80, HMMA=1, shared=163 * 1024)) == []
    assert problems(made(spilled=8)) == ["product on sm_90 spills 8 bytes a thread"]
    assert problems(made(80, shared=163 * 1024 + 1)) == [
        "product on sm_80 takes 166913 bytes of shared memory of 166912"
    ]
    assert problems(made(HMMA=1)) == ["product on sm_90 multiplies whole tiles without HGMMA"]
    specialised = made(HGMMA=1)
    specialised = specialised._replace(variant=specialised.variant._replace(maxnreg=168))
    assert problems(specialised) == ["product on sm_90 has a producer and consumers, but not both HGMMA and UTMALDG"]


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        next(compile_all(["rope"], [80]))
