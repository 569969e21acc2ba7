"""What `headrace explain` prints."""

from collections import defaultdict
from collections.abc import Iterable
from textwrap import wrap

from ..parallel.traffic import Sent
from ..pretrain.explain import Explanation, Held

WIDTH = 120
# Of what is sent: see `_traffic_lines`.
TRAFFIC_ROW = "  {:<41} {:<12} {:<14} {:>7} {:>13} {:>8} {:>13}"

Row = tuple[str, ...]


def format_explanation(found: Explanation) -> str:
    """The page, of lines of at most `WIDTH` characters, for one rank."""
    groups = _alike(found)
    blocks = [*_layout_lines(found), "", *_parameter_lines(found, groups), "", *_traffic_lines(found, groups)]
    return "\n".join(line.rstrip() for line in blocks)


def _layout_lines(found: Explanation) -> list[str]:
    train, parallel = found.config.train, found.config.parallel
    places = ", ".join(f"{axis} {found.coordinates[axis]}" for axis, degree in found.degrees.items() if degree > 1)
    tokens = " and ".join(f"{part.start:,}-{part.stop - 1:,}" for part in found.tokens)
    held = f"layers {_numbers(found.layers)} of {len(found.config.model.kinds)}"
    tp = f", shared out over {found.degrees['tp']} tp ranks between layers" if found.degrees["tp"] > 1 else ""
    lines = [
        f"{found.world_size} processes: " + " x ".join(f"{axis} {degree}" for axis, degree in found.degrees.items()),
        f"  rank {found.rank} ({places or 'alone'}) holds {held}",
        f"  and works on tokens {tokens} of rows of {found.config.data.seq_len:,}{tp}",
        f"  an update: {train.batch_rows} rows, of which this rank takes {found.rows} in {found.micro_batches} passes",
        f"  precision {found.precision}, recompute {train.recompute}",
        f"  {found.config.optimizer.words}",
    ]
    if found.degrees["cp"] > 1:
        lines.append(
            f"  cp: {parallel.cp_layout} layout, states travel by {parallel.cp_exchange}, attention by "
            f"{parallel.cp_attention}"
        )
    if found.experts:
        lines.append(_expert_line(found))
    return lines


def _expert_line(found: Explanation) -> str:
    moe, ep = found.config.model.moe, found.config.parallel.ep
    where = "dp_shard x cp x tp" if found.config.parallel.ep_over_tp else "dp_shard x cp"
    carved = f" (ep {ep}, carved out of {where}; expert_shard {found.expert_shard})" if ep > 1 else ""
    here = f"{found.experts.start}-{found.experts.stop - 1}"
    return f"  experts {here} of {moe.num_experts} are here{carved}; a token goes to {moe.top_k}"


def _alike(found: Explanation) -> dict[str, list[int]]:
    """Layers of one kind that hold and send the same, by the name to print."""
    by_signature: dict[tuple, list[int]] = defaultdict(list)
    kinds = found.config.model.kinds
    held, sent = _held_by_block(found.held), _sent_by_block(found)
    for number in found.layers:
        block = f"layers.{number}"
        by_signature[(kinds[number], tuple(held[block]), tuple(sorted(sent[block].items())))].append(number)
    return {_layer_name(signature[0], numbers): numbers for signature, numbers in by_signature.items()}


def _layer_name(kind: str, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"layer {numbers[0]} {kind}"
    return f"layers {_numbers(numbers)} {kind} x{len(numbers)}"


def _numbers(numbers: list[int]) -> str:
    """Layer numbers with stretches joined, no longer than a column."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    words = [f"{low}" if low == high else f"{low}-{high}" for low, high in parts]
    if len(words) > 5:
        words = [*words[:3], "...", words[-1]]
    return ",".join(words) or "none"


def _held_by_block(held: Iterable[Held]) -> dict[str, list[Row]]:
    """Rows of the table of parameters, those of a layer without its number."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for parameter in held:
        parts = parameter.name.split(".")
        block, name = (".".join(parts[:2]), ".".join(parts[2:])) if parts[0] == "layers" else ("", parameter.name)
        shapes = (_shape(parameter.shape), _shape(parameter.local_shape))
        rows[block].append((name, shapes[0], parameter.placement, shapes[1], f"{parameter.parameter_bytes:,}"))
    return rows


def _host_copy_lines(found: Explanation, saved_bytes: int) -> list[str]:
    if not (found.config.checkpoint.asynchronous and found.config.checkpoint.is_periodic):
        return []
    return [f"  and in the host's memory, for saves beside training: {_bytes(saved_bytes)}"]


def _parameter_lines(found: Explanation, groups: dict[str, list[int]]) -> list[str]:
    rows = _held_by_block(found.held)
    table: list[Row | str] = [("parameters", "whole", "placement", "here", "bytes"), *rows[""]]
    for name, numbers in groups.items():
        table.append(f"  {name}" + (", each:" if len(numbers) > 1 else ":"))
        table += [("  " + row[0], *row[1:]) for row in rows[f"layers.{numbers[0]}"]]
    parameters = sum(parameter.parameter_bytes for parameter in found.held)
    gradients = sum(parameter.gradient_bytes for parameter in found.held)
    optimizer = sum(parameter.optimizer_bytes for parameter in found.held)
    whole, active = found.config.model.num_params(), found.config.model.num_active_params()
    met = f", of which each token meets {active:,}" if active != whole else ""
    apart = any(parameter.gradient_bytes > parameter.parameter_bytes for parameter in found.held)
    note = f"  gradients are shared out over fsdp after the last of {found.micro_batches} micro-batches"
    return [
        *_table_lines(table),
        f"  on this rank: parameters {_bytes(parameters)}, gradients {_bytes(gradients)}, optimizer state "
        f"{_bytes(optimizer)}, together {_bytes(parameters + gradients + optimizer)}",
        *([note] if apart else []),
        *_host_copy_lines(found, parameters + optimizer),
        f"  the whole model has {whole:,} parameters{met}",
        f"  and {_bytes(found.optimizer_bytes)} of optimizer state, {found.optimizer_bytes / whole:.2f} bytes for each",
    ]


def _table_lines(table: list[Row | str]) -> list[str]:
    """Rows in columns as wide as they need; a placement that has no room goes on in the next line."""
    rows = [row for row in table if not isinstance(row, str)]
    name, whole, placement, here, size = (max(map(len, column)) for column in zip(*rows, strict=True))
    placement = min(placement, WIDTH - (name + whole + here + size + 7))
    lines: list[str] = []
    for row in table:
        if isinstance(row, str):
            lines.append(row)
            continue
        first, *more = wrap(row[2], placement)
        lines.append(f"  {row[0]:<{name}} {row[1]:>{whole}}  {first:<{placement}} {row[3]:>{here}} {row[4]:>{size}}")
        lines += [" " * (name + whole + 5) + rest for rest in more]
    return lines


def _sent_by_block(found: Explanation) -> dict[str, dict[tuple[str, str, str], tuple[int, int]]]:
    """Number and bytes of what each block sends, by axis, kind and phase."""
    totals: dict[str, dict[tuple[str, str, str], tuple[int, int]]] = defaultdict(lambda: defaultdict(lambda: (0, 0)))
    for entry, times in found.sent.items():
        count, sent = totals[entry.block][entry.axis, entry.kind, entry.phase]
        totals[entry.block][entry.axis, entry.kind, entry.phase] = count + times, sent + times * entry.sent
    return totals


def _traffic_lines(found: Explanation, groups: dict[str, list[int]]) -> list[str]:
    if not found.sent:
        return ["nothing is sent: there is one process"]
    totals = _sent_by_block(found)
    named = {"embed": "embedding", "root": "what is not in layers", "head": "head and loss"}
    lines = [
        "what this rank sends in one update, by block, mesh axis and collective",
        TRAFFIC_ROW.format("", "axis", "", "forward", "bytes", "backward", "bytes"),
    ]
    for block, name in named.items():
        lines += _block_lines(name, totals.get(block, {}))
    for name, numbers in groups.items():
        lines += _block_lines(name + (", each" if len(numbers) > 1 else ""), totals.get(f"layers.{numbers[0]}", {}))
    lines += _block_lines("between the passes", totals.get("", {}))
    lines.append("  " + "-" * 114)
    lines += _axis_lines(found.sent.items())
    if any(entry.axis == "ep" for entry in found.sent):
        lines.append("  over ep as many tokens are counted as are expected where all experts are alike to the router;")
        lines.append(
            "  a run sends what its router decides: the record `routing` in metrics.jsonl tells how uneven it is"
        )
    return lines


def _block_lines(name: str, sent: dict[tuple[str, str, str], tuple[int, int]]) -> list[str]:
    lines: list[str] = []
    for axis, kind in dict.fromkeys((axis, kind) for axis, kind, _ in sent):
        count, there = sent.get((axis, kind, "forward"), (0, 0))
        more, back = sent.get((axis, kind, "backward"), (0, 0))
        extra, outside = sent.get((axis, kind, "between"), (0, 0))
        # What is between the passes stands in the columns of the forward pass.
        figures = [f"{n:,}" if n else "" for n in (count + extra, there + outside, more, back)]
        lines.append(TRAFFIC_ROW.format(name if not lines else "", axis, kind, *figures))
    return lines


def _axis_lines(sent: Iterable[tuple[Sent, int]]) -> list[str]:
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry, times in sent:
        totals[entry.axis][0] += times * (entry.kind != "recv")
        totals[entry.axis][1] += times * entry.sent
    lines = [
        f"  over {axis}: {_bytes(total)} in {count:,} collectives or messages"
        for axis, (count, total) in totals.items()
    ]
    return [*lines, f"  over all axes: {_bytes(sum(total for _, total in totals.values()))}"]


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _bytes(count: int) -> str:
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:.0f} {unit}"
    return f"{count} B"
