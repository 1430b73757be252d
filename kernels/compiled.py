"""What the compiler makes of every kernel for Ampere (sm_80) and Hopper (sm_90), on a machine that needs no GPU.

    python -m isheep_kernels.compiled [op …] [--chip sm_80|sm_90] [--first]

prints registers and spilled bytes of a thread, shared memory of a block, and how many instructions of each kind that
carry a kernel: HMMA and HGMMA multiply on tensor cores (HGMMA is Hopper's), LDGSTS and UTMALDG copy to shared memory
while others work (UTMALDG is Hopper's TMA). Ends with status 1 where `problems` finds any. This proves neither numbers
nor speed: the interpreter tests and `bench.py` do.
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

import isheep_kernels
from isheep_kernels.variant import Variant

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "UTMALDG")
WARPGROUP_ROWS = 64  # HGMMA multiplies at least so many rows


class Compiled(NamedTuple):
    """One variant for one chip."""

    variant: Variant
    chip: int  # 80, 90
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block
    counts: Counter[str]  # of INSTRUCTIONS in the code


def ops() -> list[str]:
    """The modules that have variants, by name."""
    names = (module.name for module in pkgutil.iter_modules(isheep_kernels.__path__))
    modules = {n: importlib.import_module(f"isheep_kernels.{n}") for n in names if n not in ("bench", "compiled")}
    return sorted(name for name, module in modules.items() if hasattr(module, "variants"))


def variants(op: str, chip: int) -> Iterator[Variant]:
    yield from importlib.import_module(f"isheep_kernels.{op}").variants(chip)


def compile_all(names: Iterable[str], chips: Iterable[int], first: bool = False) -> Iterator[Compiled]:
    """Every variant of these modules, or the first of each kernel, for each of these chips.

    RuntimeError where Triton was told to interpret.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("compiled: unset TRITON_INTERPRET: kernels that are interpreted cannot be compiled")
    for name in names:
        for chip in chips:
            found = list(variants(name, chip))
            if first:
                found = [v for i, v in enumerate(found) if v.kernel not in (u.kernel for u in found[:i])]
            yield from (compile_variant(variant, chip) for variant in found)


def compile_variant(variant: Variant, chip: int) -> Compiled:
    """As a launch would compile it: integers known to be multiples of 16 are what vector copies depend on."""
    kernel = variant.kernel
    signature = {name: variant.signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in variant.divisible_by_16}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    options |= {"maxnreg": variant.maxnreg}
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, spilled, counts = _read(binary.asm["cubin"])
    return Compiled(variant, chip, registers, spilled, binary.metadata.shared, counts)


def problems(compiled: Compiled) -> list[str]:
    """What must not ship: spills, too much shared memory, Hopper's code without Hopper's instructions."""
    variant, chip, _, spilled, shared, counts = compiled
    found = []
    if spilled:
        found.append(f"spills {spilled} bytes a thread")
    if shared > SHARED[chip]:
        found.append(f"takes {shared} bytes of shared memory of {SHARED[chip]}")
    if chip >= 90 and counts["HMMA"] and not counts["HGMMA"] and variant.constants.get("BLOCK_M", 0) >= WARPGROUP_ROWS:
        found.append("multiplies whole tiles without HGMMA")
    if variant.maxnreg and not (counts["HGMMA"] and counts["UTMALDG"]):  # of a producer and consumers
        found.append("has a producer and consumers, but not both HGMMA and UTMALDG")
    return [f"{variant.name} on sm_{chip} {what}" for what in found]


def _read(cubin: bytes) -> tuple[int, int, Counter[str]]:
    """Registers and local bytes of a thread, which no kernel uses but to spill, and INSTRUCTIONS counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers, stack = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    words = Counter(re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+ )?(\w+)", code, re.MULTILINE))
    return registers, stack, Counter({word: words[word] for word in INSTRUCTIONS})


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(ops())}")
    parser.add_argument("--chip", choices=[f"sm_{chip}" for chip in SHARED], help="default: both")
    parser.add_argument(
        "--first", action="store_true", help="of each kernel the first variant alone: a minute, not ten"
    )
    args = parser.parse_args()
    if unknown := set(args.ops) - set(ops()):
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(ops())}")
    chips = [chip for chip in SHARED if args.chip in (None, f"sm_{chip}")]

    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':56}  chip {'registers':>10}{'spilled':>8}{'shared':>8}", *(f"{w:>8}" for w in INSTRUCTIONS), sep=""
    )
    found = []
    for compiled in compile_all(args.ops or ops(), chips, args.first):
        variant, chip, registers, spilled, shared, counts = compiled
        numbers = f"{registers:>10}{spilled:>8}{shared:>8}" + "".join(f"{counts[word]:>8}" for word in INSTRUCTIONS)
        print(f"{variant.name:56} sm_{chip}{numbers}", flush=True)
        found += problems(compiled)
    for problem in found:
        print(problem, file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
