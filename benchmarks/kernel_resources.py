"""Compiles every Triton kernel for every architecture, with no GPU, and tells what it takes of a processor.

python benchmarks/kernel_resources.py [--all] [--archs sm_90 ...] [--dtypes bf16 ...] [--json FILE] [--write]

A short list of cases is taken unless `--all` asks for every case and dtype. `--write` puts the table into
docs/kernels.md. The exit status is 1 when a kernel spills registers, needs more shared memory than a program may have,
or does not compile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

from kernel_cases import CASES, DTYPES

ROOT = Path(__file__).resolve().parents[1]
# Shared memory one program may have, bytes: CUDA programming guide, compute capabilities; CDNA3 ISA, local data share.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def launches(arch: str, dtypes: list[str], every: bool = True) -> list[dict[str, Any]]:
    """What the cases launch on `arch`, each different compilation once, as plain values; `every`: long list too."""
    from headrace.kernels.launch import record_launches

    found: dict[str, dict[str, Any]] = {}
    for case in (case for case in CASES if every or case.short):
        for dtype in dtypes:
            with record_launches(arch) as recorded:
                case.run("meta", DTYPES[dtype])
            for one in recorded:
                plan = compilation(one) | {"arch": arch, "dtype": dtype, "case": case.name}
                key = json.dumps([plan[k] for k in ("module", "kernel", "signature", "constants", "options")])
                found.setdefault(key, plan)
    return list(found.values())


def compilation(launch: Any) -> dict[str, Any]:
    """Types and constants that Triton would specialise `launch` for."""
    signature, constants, aligned = {}, {}, []
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif hasattr(value, "dtype"):
            signature[parameter.name] = "*" + TYPES[str(value.dtype)]
            aligned.append(index)  # allocations are
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
        else:
            signature[parameter.name] = "fp32"
    return {
        "module": launch.kernel.fn.__module__,
        "kernel": launch.name,
        "signature": signature,
        "constants": constants,
        "aligned": aligned,
        "options": {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    }


TYPES = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
    "torch.int64": "i64",
    "torch.int16": "i16",
    "torch.int8": "i8",
    "torch.uint8": "u8",
    "torch.int32": "i32",
    "torch.bool": "i1",
}


def compile_one(plan: dict[str, Any]) -> dict[str, Any]:
    """Compile for the plan's architecture; adds registers a thread, spilled bytes and shared bytes."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(plan["module"]), plan["kernel"])
    arch = plan["arch"]
    is_cuda = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if is_cuda else GPUTarget("hip", arch, 64)
    attributes = {(index,): [["tt.divisibility", 16]] for index in plan["aligned"]}
    source = ASTSource(kernel, plan["signature"], plan["constants"], attributes)
    try:
        compiled = triton.compile(source, target=target, options=plan["options"])
    except Exception as error:  # whatever a compiler's stage raises is the result
        return plan | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    measure = _nvidia_resources if is_cuda else _amd_resources
    return plan | {"shared": compiled.metadata.shared} | measure(compiled)


def _nvidia_resources(compiled: Any) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]) + int(usage["LOCAL"])}


def _amd_resources(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    return {
        "registers": value("vgpr_count"),
        "spilled": 4 * value("vgpr_spill_count") + value("private_segment_fixed_size"),
    }


def problems(result: dict[str, Any]) -> str:
    """What is wrong with a compiled kernel, or nothing."""
    if "error" in result:
        return result["error"]
    wrong = []
    if result["spilled"]:
        wrong.append(f"spills {result['spilled']} bytes a thread")
    if result["shared"] > SHARED_LIMIT[result["arch"]]:
        wrong.append(f"needs {result['shared']} bytes of shared memory, {SHARED_LIMIT[result['arch']]} are there")
    return "; ".join(wrong)


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| kernel | case | dtype | part | warps | stages | registers | shared, bytes | spilled |",
        "|---" * 9 + "|",
    ]
    for r in sorted(results, key=lambda r: (r["kernel"], r["case"], r["arch"], r["dtype"])):
        options = r["options"]
        cells = [r["kernel"].strip("_"), r["case"], r["dtype"], r["arch"], options["num_warps"], options["num_stages"]]
        cells += [r.get("error", r.get("registers")), r.get("shared", ""), r.get("spilled", "")]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace the table in docs/kernels.md."""
    path = ROOT / "docs/kernels.md"
    begin, end = "<!-- resources -->", "<!-- end of resources -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> int:
    """Compile, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="bf16 and fp32, and with --all fp16")
    parser.add_argument("--all", action="store_true", help="every case, not only the short list")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    dtypes = options.dtypes or (list(DTYPES) if options.all else ["bf16", "fp32"])
    plans = [plan for arch in options.archs for plan in launches(arch, dtypes, options.all)]
    plans = [plan for plan in plans if options.only in plan["kernel"]]
    with ProcessPoolExecutor(options.workers) as pool:
        results = list(pool.map(compile_one, plans))
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results))
    if options.write:
        write(table(results))
    wrong = [f"{r['kernel']} ({r['case']}, {r['dtype']}, {r['arch']}): {problems(r)}" for r in results if problems(r)]
    print(*wrong, f"{len(results)} compiled, {len(wrong)} with problems", sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
