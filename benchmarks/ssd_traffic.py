"""Counts the memory traffic of the SSD path, forward and backward, from what its kernels are launched with; no GPU.

    python benchmarks/ssd_traffic.py [--arch sm_90] [--tile span=8 ...] [--write]

For each kernel and tensor argument: bytes that must come from memory, bytes written, and the bytes of all loads, as if
nothing stayed in L2. Tensors are bfloat16, A, D and sums float32; no resets. Which loads a kernel makes is written down
here as formulas of its launch; tests/kernels/test_ssd_traffic.py holds them against every load and store of the
interpreted kernels. `--tile` tries other tile choices; `--write` puts the tables into docs/benchmarks.md. The exit
status is 1 when a call that keeps its states moves more than 1.3 times the minimum.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
BANDWIDTH = 4.3e12  # bytes per second of one H200, as in the goals
LIMIT = 1.3
SECTOR = 32  # bytes; the least that is fetched
STATES_EVERY = 128  # tokens from one kept state to the next, in the minimum
# B, L, H, P, G, N; the goals' microseconds at best, and of mamba_ssm's traffic at its best chunk.
SHAPES = {
    (8, 2048, 80, 64, 1, 128): (281, 1154),
    (4, 4096, 128, 64, 8, 128): (487, 2212),
    (1, 65536, 128, 64, 8, 128): (1946, 8849),
}
ASSUMPTIONS = """\
A tensor comes from memory once per kernel where the programs that load it again are neighbours in the grid (the last
column: among how many programs they are) and run at about the same time; otherwise as often as it is loaded. Nothing is
assumed to stay in L2 from one kernel to the next.

- decays: nothing is loaded twice but A, which is small; so are D and total decays elsewhere.
- products: nothing is loaded twice.
- scan and states: B, C and products are shared by the heads of a group, which are neighbours; decays are loaded several
  times by one program.
- compose: total decays are shared by the blocks of a state, which are neighbours.
- gradients: x, dy and decays are shared by column blocks and by the chunks of a span, states by the chunks of a span;
  both are neighbours. B, C and products are loaded again for each head, by one program. Where a group's heads are
  split, the splits are far apart in the grid: B, C and products come from memory once for each.
- flows: what leaves to states is loaded again one token further, by the same program.
- sum_splits: nothing is loaded twice."""


@dataclass(frozen=True)
class Access:
    """How a kernel uses one argument, in elements.

    Attributes:
        loads: elements of all loads.
        read: different elements among them.
        fetches: how often those come from memory.
        stores: elements written, none twice.
        isolated: elements lie apart from each other; each moves a sector.
        reach: programs, in the order of the grid, among which are all that load an element for one fetch.
    """

    loads: int = 0
    read: int = 0
    fetches: int = 1
    stores: int = 0
    isolated: bool = False
    reach: int = 1


Accesses = dict[str, Access]
Arguments = dict[str, Any]
Grid = tuple[int, ...]


def shared(value: torch.Tensor, times: int = 1, fetches: int = 1, reach: int = 1) -> Access:
    """All of a tensor loaded `times` times."""
    return Access(value.numel() * times, value.numel(), fetches, reach=reach)


def written(value: torch.Tensor) -> Access:
    """All of a tensor stored."""
    return Access(stores=value.numel())


def _decays(a: Arguments, grid: Grid) -> Accesses:
    outputs = ("dt_ptr", "log_ptr", "log_low_ptr", "from_ptr", "from_low_ptr")
    stored = {name: written(a[name]) for name in outputs if a[name] is not None}
    A = shared(a["A_ptr"], grid[0] * grid[1], reach=math.prod(grid))
    return {"dt_in_ptr": shared(a["dt_in_ptr"]), "A_ptr": A} | stored


def _products(a: Arguments, grid: Grid) -> Accesses:
    return {"B_ptr": shared(a["B_ptr"]), "C_ptr": shared(a["C_ptr"]), "products_ptr": written(a["products_ptr"])}


def _scan(a: Arguments, grid: Grid) -> Accesses:
    blocks_p, Q = grid[0] // a["H"], a["Q"]
    of_head = grid[0] - a["H"] + 1  # from a head's first program to its last
    programs, of_group = a["heads_per_group"] * blocks_p, of_head + a["heads_per_group"] - 1
    log = Access(a["log_ptr"].numel() // Q * blocks_p * (2 * Q + 2), a["log_ptr"].numel(), reach=of_head)
    from_ = shared(a["from_ptr"], 2 * blocks_p, reach=of_head)
    found = {
        "values_ptr": shared(a["values_ptr"]),
        "reads_ptr": shared(a["reads_ptr"], programs, reach=of_group),
        "writes_ptr": shared(a["writes_ptr"], programs, reach=of_group),
        "products_ptr": shared(a["products_ptr"], programs, reach=of_group),
        **_with_low(a, log, from_),
        "out_ptr": written(a["out_ptr"]),
        "last_ptr": written(a["last_ptr"]),
    }
    if a["D_ptr"] is not None:
        times = grid[1] * grid[2] * (1 if a["D_PER_CHANNEL"] else blocks_p)
        found["D_ptr"] = shared(a["D_ptr"], times, reach=math.prod(grid))
    return found | _states_in_and_out(a)


def _states(a: Arguments, grid: Grid) -> Accesses:
    blocks_p, Q = grid[0] // a["H"], a["Q"]
    of_head = grid[0] - a["H"] + 1
    numel = a["log_ptr"].numel()
    log_loads = numel // Q * blocks_p * ((Q + 1) if a["REVERSE"] else 2)
    if a["REVERSE"]:
        log, from_ = Access(log_loads, numel, reach=of_head), Access()
    else:
        log = Access(log_loads, numel // Q, isolated=True, reach=of_head)
        from_ = shared(a["from_ptr"], blocks_p, reach=of_head)
    return {
        "values_ptr": shared(a["values_ptr"]),
        "keys_ptr": shared(a["keys_ptr"], a["heads_per_group"] * blocks_p, reach=of_head + a["heads_per_group"] - 1),
        **_with_low(a, log, from_),
        "total_ptr": written(a["total_ptr"]),
        "leaving_ptr": written(a["leaving_ptr"]),
    } | _states_in_and_out(a)


def _compose(a: Arguments, grid: Grid) -> Accesses:
    found = {
        "total_ptr": shared(a["total_ptr"], grid[0], reach=grid[0]),
        "leaving_ptr": shared(a["leaving_ptr"]),
        "entering_ptr": written(a["entering_ptr"]),
    }
    return found if a["initial_ptr"] is None else found | {"initial_ptr": shared(a["initial_ptr"])}


def _gradients(a: Arguments, grid: Grid) -> Accesses:
    Q, L, H, G, N, span, chunks = (a[name] for name in ("Q", "length", "H", "G", "N", "SPAN", "chunks"))
    columns, blocks_p, splits = a["BLOCKS_N"], a["BLOCKS_P"], grid[2]
    steps = [(c, min(span, chunks - c // span * span)) for c in range(chunks)]  # each with the size of its span
    before = sum(c % span for c, _ in steps)
    after = sum(size - 1 - c % span for c, size in steps)
    # The last chunk, which may be shorter, is loaded by all of its span.
    tokens_after = after * Q - (chunks * Q - L) * ((chunks - 1) % span)
    heads, of_span = a["batch"] * H, columns * span
    found = {}
    for name, extra in (("x_ptr", before * Q), ("dy_ptr", tokens_after)):
        found[name] = Access(heads * a["P"] * columns * (2 * L + extra), a[name].numel(), reach=of_span)
    for name, extra in (("B_ptr", before * Q), ("C_ptr", tokens_after)):
        loads = a["batch"] * G * N * (H // G * blocks_p * (L + extra) + splits * L)
        found[name] = Access(loads, a[name].numel(), splits, reach=of_span)
    log_loads = chunks * (4 * Q + 1) + blocks_p * (before * 2 + after * (Q + 1))
    log = Access(heads * columns * log_loads, a["log_ptr"].numel(), reach=of_span)
    from_read = heads * sum(Q for c, size in steps if c % span < size - 1)
    from_ = Access(heads * columns * blocks_p * before * Q, from_read, reach=of_span)
    states = Access(heads * chunks * a["P"] * N, a["states_ptr"].numel(), reach=of_span)
    return found | {
        "products_ptr": shared(a["products_ptr"], H // G * columns, splits, reach=columns),
        "dt_ptr": shared(a["dt_ptr"], columns, reach=columns),
        **_with_low(a, log, from_),
        "states_ptr": states,
        "dstates_ptr": states,
        **{name: written(a[name]) for name in ("flows_ptr", "dB_ptr", "dC_ptr", "dheads_ptr")},
    }


def _flows(a: Arguments, grid: Grid) -> Accesses:
    heads_chunks, Q, parts = a["dt_ptr"].numel() // a["Q"], a["Q"], a["PARTS"]
    flows = a["flows_ptr"].numel()
    once = Access(heads_chunks, heads_chunks, isolated=True)
    one_of_sums = Access(heads_chunks * parts, heads_chunks * parts, stores=heads_chunks * parts, isolated=True)
    return {
        "flows_ptr": Access(flows + parts * heads_chunks * (Q - 1), flows),
        "dheads_ptr": one_of_sums,
        "dt_ptr": Access(heads_chunks * (2 * Q - 1), a["dt_ptr"].numel()),
        "log_ptr": once,
        **({} if a["log_low_ptr"] is None else {"log_low_ptr": once}),
        "A_ptr": shared(a["A_ptr"], grid[0] * grid[1], reach=math.prod(grid)),
        "ddt_ptr": written(a["ddt_ptr"]),
    }


def _sum_splits(a: Arguments, grid: Grid) -> Accesses:
    loaded = {name: shared(a[name]) for name in ("B_ptr", "C_ptr")}
    return loaded | {name: written(a[name]) for name in ("total_B_ptr", "total_C_ptr")}


def _with_low(a: Arguments, log: Access, from_: Access) -> Accesses:
    low = {} if a["log_low_ptr"] is None else {"log_low_ptr": log, "from_low_ptr": from_}
    return {"log_ptr": log, "from_ptr": from_} | low


def _states_in_and_out(a: Arguments) -> Accesses:
    found = {}
    if a["entering_ptr"] is not None:
        found["entering_ptr"] = shared(a["entering_ptr"])
    if a["kept_ptr"] is not None:
        found["kept_ptr"] = written(a["kept_ptr"])
    return found


KERNELS: dict[str, Callable[[Arguments, Grid], Accesses]] = {
    "_ssd_decays_kernel": _decays,
    "_ssd_products_kernel": _products,
    "_ssd_scan_kernel": _scan,
    "_ssd_states_kernel": _states,
    "_ssd_compose_kernel": _compose,
    "_ssd_gradients_kernel": _gradients,
    "_ssd_flows_kernel": _flows,
    "_ssd_sum_splits_kernel": _sum_splits,
}


def accesses(launch: Any) -> Accesses:
    """How `launch` uses each of its tensors. Raises ValueError for a tensor that no formula covers."""
    found = KERNELS[launch.name](launch.arguments, launch.grid)
    tensors = {name for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    if tensors != set(found):
        raise ValueError(f"{launch.name}: no formula for {sorted(tensors ^ set(found))}")
    return found


@dataclass(frozen=True)
class Traffic:
    """Bytes that one kernel moves for one argument.

    `unshared` are the bytes of all its loads and stores; all that load an element for one fetch are among `reach`
    programs in the order of the grid.
    """

    kernel: str
    argument: str
    read: int
    written: int
    unshared: int
    reach: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def traffic(launch: Any) -> list[Traffic]:
    """What `launch` moves, an entry an argument."""
    label = launch.name.removeprefix("_ssd_").removesuffix("_kernel")
    label += ", reverse" if launch.arguments.get("REVERSE") else ""
    rows = []
    for name, access in accesses(launch).items():
        tensor = launch.arguments[name]
        whole = tensor.numel() * tensor.element_size()
        unit = SECTOR if access.isolated else tensor.element_size()
        read, stored = (min(whole, count * unit) for count in (access.read, access.stores))
        unshared = (access.loads + access.stores) * unit
        rows.append(Traffic(label, name.removesuffix("_ptr"), read * access.fetches, stored, unshared, access.reach))
    return rows


def run(shape: tuple[int, ...], device: str, dtype: torch.dtype, *, keep: bool, everything: bool = False) -> None:
    """Run forward and backward; `everything`: with a state that enters and a gradient of the one that leaves."""
    from headrace.kernels.ssd.fused import path

    B, L, H, P, G, N = shape

    def normal(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    x, dy, keys, queries = normal(B, L, H, P), normal(B, L, H, P), normal(B, L, G, N), normal(B, L, G, N)
    A, D = -normal(H, dtype=torch.float32).abs(), normal(H, dtype=torch.float32)
    inputs = path.FusedInputs(x, normal(B, L, H).abs(), A, keys, queries, D, None)
    initial, dfinal = (normal(B, H, P, N, dtype=torch.float32) if everything else None for _ in range(2))
    decays = path.prepare(inputs)
    _, _, states = path.ssd_fused_forward(inputs, initial, decays, keep=keep)
    path.ssd_fused_backward(dy, dfinal, inputs, initial, states, decays)


def count(shape: tuple[int, ...], arch: str, *, keep: bool) -> list[Traffic]:
    """What a forward and a backward pass over `shape` move on `arch`."""
    from headrace.kernels.launch import record_launches

    with record_launches(arch) as launches:
        run(shape, "meta", torch.bfloat16, keep=keep)
    return [row for launch in launches for row in traffic(launch)]


def minimum(shape: tuple[int, ...], *, keep: bool) -> int:
    """Bytes when each tensor is moved once a pass.

    Forward: x, B, C and dt in, y and states out. Backward: x, dy, B, C, dt and states in, dx, dB, dC and ddt out.
    """
    B, L, H, P, G, N = shape
    states = -(-L // STATES_EVERY) * P * N if keep else 0
    return 2 * B * (H * (5 * L * P + 3 * L + 2 * states) + 6 * L * G * N)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _cells(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def by_kernel(rows: list[Traffic]) -> str:
    """A table with a row an argument and one a kernel, MB."""
    titles = ["kernel", "argument", "read", "written", "all loads and stores", "loaded among programs"]
    lines = [_cells(*titles), "| --- | --- " + "| ---: " * 4 + "|"]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        own = [row for row in rows if row.kernel == kernel]
        for row in own:
            figures = [_megabytes(value) for value in (row.read, row.written, row.unshared)]
            lines.append(_cells(kernel, row.argument, *figures, row.reach if row.read else ""))
        sums = [sum(getattr(row, name) for row in own) for name in ("read", "written", "unshared")]
        lines.append(_cells(f"**{kernel}**", "", *(f"**{_megabytes(value)}**" for value in sums), ""))
    return "\n".join(lines)


def summary(counted: dict[tuple[tuple[int, ...], bool], list[Traffic]]) -> str:
    """A table with a row a shape and variant."""
    titles = ["shape", "states", "MB", "µs", "minimum, MB", "µs", "goals' µs", "× minimum"]
    titles += ["all loads and stores, MB", "mamba_ssm, MB", "× ours"]
    lines = [_cells(*titles), "| --- | --- " + "| ---: " * 9 + "|"]
    for (shape, keep), rows in counted.items():
        least, (at_best, mamba) = minimum(shape, keep=keep), SHAPES[shape]
        moved, unshared = (sum(getattr(row, name) for row in rows) for name in ("moved", "unshared"))
        cells = ["×".join(map(str, shape)), "kept" if keep else "computed again"]
        cells += [_megabytes(moved), f"{moved / BANDWIDTH * 1e6:.0f}"]
        cells += [_megabytes(least), f"{least / BANDWIDTH * 1e6:.0f}", str(at_best) if keep else ""]
        cells += [f"{moved / least:.2f}", _megabytes(unshared)]
        theirs = mamba * 1e-6 * BANDWIDTH
        lines.append(_cells(*cells, _megabytes(theirs), f"{theirs / moved:.1f}"))
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace the tables in docs/benchmarks.md."""
    path = ROOT / "docs/benchmarks.md"
    begin, end = "<!-- ssd traffic -->", "<!-- end of ssd traffic -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> int:
    """Count, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--tile", nargs="+", default=[], metavar="NAME=VALUE", help="instead of tiles.toml's")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    from headrace.kernels.ssd.fused import plan
    from headrace.kernels.tiles import tile

    chosen = {name: int(value) for name, value in (pair.split("=") for pair in options.tile)}
    with mock.patch.object(plan, "tile", lambda *names: tile(*names) | chosen):
        counted = {(s, keep): count(s, options.arch, keep=keep) for s in SHAPES for keep in (True, False)}
    print(ASSUMPTIONS)
    for (shape, keep), rows in counted.items():
        print(f"\n{shape}, states {'kept' if keep else 'computed again'}, MB\n\n{by_kernel(rows)}")
    print(f"\nmamba_ssm's bytes are the goals' microseconds at {BANDWIDTH / 1e12} TB/s.\n\n{summary(counted)}")
    if options.write:
        first = next(iter(SHAPES))
        write(f"{summary(counted)}\n\nBy argument at {first}, states kept, MB:\n\n{by_kernel(counted[first, True])}")
    ratios = [sum(r.moved for r in rows) / minimum(s, keep=True) for (s, keep), rows in counted.items() if keep]
    return max(ratios) > LIMIT


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.exit(main())
