"""What each tuned Triton kernel becomes on Hopper, found by compiling alone: registers, spills, shared memory, HGMMA.

No GPU is needed: Triton compiles for sm_90 anywhere, and its wheel brings the disassembler. Run it with
``python -m labkit.kernels.compile_check``, TRITON_INTERPRET unset; it prints a table and fails if a kernel spills
registers, or lacks the tensor core instructions of Hopper that it should have.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one program can have on sm_90."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class CompileCase:
    """A kernel in one tuned configuration. A kernel's file lists its own in ``COMPILE_CASES``."""

    name: str
    kernel: Any
    """The ``@triton.jit`` function."""
    signature: dict[str, str]
    """Argument -> type of every argument that is no constexpr: "*bf16", "i32", "fp32"; "i32:16" is a multiple of 16.
    Pointers are taken to be aligned to 16 bytes, as torch's allocations are. An integer that is always 1 (a stride)
    belongs to the constexprs, for that is what a launch makes of it."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    hgmma: bool = False
    """Whether the kernel must use Hopper's tensor core instruction."""
    spills: int = 0
    """Bytes of a thread that may be spilled, where a configuration was measured to be the fastest all the same."""


@dataclass(frozen=True)
class Build:
    """What became of a case."""

    name: str
    registers: int
    """32-bit registers of a thread."""
    spilled: int
    """Bytes of local memory of a thread, where registers are spilled to."""
    shared: int
    """Bytes of shared memory of a program."""
    hgmma: int | None
    """HGMMA instructions in the machine code; None where none need be there, for disassembling takes half a second."""
    tma: int | None
    """Instructions there that load or store through a tensor descriptor."""
    faults: tuple[str, ...]


def build(case: CompileCase) -> Build:
    """Compiles a case for sm_90 and reads the result."""
    names = case.kernel.arg_names
    types = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    if set(types) != set(names):
        raise ValueError(f"{case.name}: the case and the kernel differ in {sorted(set(types) ^ set(names))}")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or types[name].endswith(":16")
    }
    signature = {name: types[name].removesuffix(":16") for name in names}
    source = ASTSource(case.kernel, signature, case.constexprs, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=HOPPER, options=options)
    usage = _dump(compiled.asm["cubin"], "--dump-resource-usage")
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    spilled, shared = stack + local, compiled.metadata.shared
    code = _dump(compiled.asm["cubin"], "--dump-sass") if case.hgmma else None
    hgmma, tma = (None, None) if code is None else (code.count("HGMMA"), len(re.findall(r"\bUTMA", code)))
    faults = []
    if spilled > case.spills:
        faults.append(f"spills {spilled} bytes a thread")
    if shared > SHARED_LIMIT:
        faults.append(f"wants {shared} bytes of shared memory, of {SHARED_LIMIT}")
    if case.hgmma and not hgmma:
        faults.append("has no HGMMA")
    return Build(case.name, registers, spilled, shared, hgmma, tma, tuple(faults))


def _dump(cubin: bytes, what: str) -> str:
    """What the disassembler prints of a cubin: its use of resources, or its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(TOOLS / "cuobjdump"), what, str(path)]
        environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def cases(modules: list[str]) -> Iterator[CompileCase]:
    """The cases of the modules named, or of every module beside this one if none is."""
    beside = [f"labkit.kernels.{each.name}" for each in pkgutil.iter_modules([str(Path(__file__).parent)])]
    for name in modules or beside:
        if name != "labkit.kernels.compile_check":
            yield from getattr(importlib.import_module(name), "COMPILE_CASES", [])


def main(modules: list[str]) -> int:
    """Prints a line for every case; returns 1 if any has a fault."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("compile_check: unset TRITON_INTERPRET; interpreted kernels cannot be compiled")
    print(f"{'kernel':44} {'registers':>9} {'spilled':>7} {'shared':>7} {'HGMMA':>5} {'TMA':>4}", flush=True)
    failed = 0
    for case in cases(modules):
        one = build(case)
        failed += bool(one.faults)
        hgmma, tma = ("–" if each is None else each for each in (one.hgmma, one.tma))
        line = f"{one.name:44} {one.registers:9} {one.spilled:7} {one.shared:7} {hgmma:>5} {tma:>4}"
        print(f"{line}  {'; '.join(one.faults)}".rstrip(), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
