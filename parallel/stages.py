"""Which layers make up each pipeline stage, which stages each rank holds, and whether a schedule can run them."""

from itertools import accumulate, pairwise

from ..errors import UserError
from ..model.config import ModelConfig
from .config import ParallelConfig
from .recompute import Recompute


def cut_stages(model_config: ModelConfig, num_stages: int, seq_len: int) -> list[range]:
    """The layers of each stage: contiguous, at least one each, the most expensive stage as cheap as possible.

    A layer costs what it computes per token of rows of `seq_len` tokens, the output head counts to the last stage, and
    the embedding costs nothing. Among all such cuts the second most expensive stage is as cheap as possible too, and so
    on; where stages can be swapped, the earlier ones, which hold more activations, are the cheaper. Exact; the same
    everywhere.

    Raises:
        UserError: more stages than layers.
    """
    layers = model_config.layers
    if not 1 <= num_stages <= len(layers):
        raise UserError(f"{num_stages} pipeline stages need as many layers, but model.pattern has {len(layers)}")
    costs = [layer.flops_per_token(model_config.d_model, seq_len) for layer in layers]
    costs[-1] += 6 * model_config.vocab_size * model_config.d_model
    bounds = [0, *_cut_evenly(costs, num_stages)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _cut_evenly(costs: list[int], parts: int) -> tuple[int, ...]:
    """Where each of `parts` stretches ends, so that their costs in descending order are least, compared in that order.

    Dynamic programming over prefixes: a stretch added to two cuts of the same prefix leaves the better one better.
    """
    total = [0, *accumulate(costs)]
    best: list[tuple[list[int], tuple[int, ...]] | None] = [([], ()), *[None] * len(costs)]
    for part in range(1, parts + 1):
        found: list[tuple[list[int], tuple[int, ...]] | None] = [None] * len(best)
        for stop in range(part, len(best)):
            chosen = None
            for start in reversed(range(part - 1, stop)):
                before, own = best[start], total[stop] - total[start]
                if before is None:
                    continue
                if chosen is not None and own > chosen[0][0]:
                    break  # longer stretches cost no less
                candidate = sorted([*before[0], own], reverse=True)
                if chosen is None or candidate <= chosen[0]:
                    chosen = candidate, (*before[1], stop)
            found[stop] = chosen
        best = found
    assert best[-1] is not None
    return best[-1][1]


def stages_of_rank(config: ParallelConfig, rank: int) -> list[int]:
    """The stages that a rank of the pipeline axis holds: every `pp`-th, so that each hands on to the next rank."""
    return list(range(rank, config.num_stages, config.pp))


def num_micro_batches(rows: int, micro_rows: int) -> int:
    """Micro-batches of `micro_rows` rows, the last one filled up."""
    return -(-rows // micro_rows)


def pipeline_problems(
    config: ParallelConfig,
    rows_per_rank: int,
    micro_rows: int,
    *,
    recompute: Recompute = "none",
    compiled: bool = False,
) -> list[str]:
    """Why the schedule cannot run the micro-batches of `rows_per_rank` rows each data rank has, with what it could.

    Args:
        config: valid by itself.
        rows_per_rank: rows of one update on one data rank.
        micro_rows: rows of a micro-batch, at least 1.
        recompute: what blocks recompute in backward.
        compiled: whether blocks are compiled.
    """
    found = []
    if config.pp > 1 and config.pp_schedule == "zero_bubble" and (recompute != "none" or compiled):
        found.append(
            "parallel.pp_schedule=zero_bubble runs each backward pass in two halves, "
            f"which blocks with train.recompute={recompute}, train.compile={str(compiled).lower()} cannot; "
            "set recompute=none and compile=false, or pp_schedule=interleaved"
        )
    return found + _count_problems(config, rows_per_rank, micro_rows)


def _count_problems(config: ParallelConfig, rows_per_rank: int, micro_rows: int) -> list[str]:
    count = num_micro_batches(rows_per_rank, micro_rows)
    if _schedulable(config, count):
        return []
    if config.pp_schedule == "1f1b":
        rule = f"fewer than the pp={config.pp} ranks of the pipeline"
    else:
        rule = f"which pp_schedule={config.pp_schedule} cannot deal out evenly over rounds of pp={config.pp}"
    # Of all sizes that give as many micro-batches the smallest wastes least.
    counts = {num_micro_batches(rows_per_rank, rows): rows for rows in range(rows_per_rank, 0, -1)}
    fitting = [rows for other, rows in counts.items() if _schedulable(config, other)]
    nearest = sorted(sorted(fitting, key=lambda rows: abs(rows - micro_rows))[:4])
    sizes = ", ".join(map(str, nearest))
    remedy = f"use train.micro_batch_rows in {{{sizes}}}" if nearest else "raise train.batch_rows"
    return [
        f"train.micro_batch_rows={micro_rows} cuts the {rows_per_rank} rows of each data rank into {count} "
        f"micro-batches, {rule}; {remedy}, or lower parallel.pp"
    ]


def _schedulable(config: ParallelConfig, count: int) -> bool:
    """What torch's schedule classes ask of the number of micro-batches."""
    if config.pp_schedule == "1f1b":
        return count >= config.num_stages
    return count % max(1, count // config.pp) == 0
