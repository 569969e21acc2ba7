"""The operators of expert layers by definition, in plain autograd code.

Letters: `T` tokens, `k` copies of a token, `S` rows ordered by expert, `X` experts, `F` and `O` widths in and out.
"""

import torch
from torch import Tensor

from ..numerics import compute_dtype


def expert_order_reference(experts_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the copies of tokens by expert, and number the rows that every expert gets; as `expert_order`."""
    flat = experts_Tk.flatten().tolist()
    place, ends = [-1] * len(flat), []
    rows = 0
    for expert in range(num_experts):
        for copy in (i for i, chosen in enumerate(flat) if chosen == expert):
            place[copy] = rows
            rows += 1
        ends.append(rows)
    place_Tk = torch.tensor(place, dtype=torch.int64, device=experts_Tk.device).view(experts_Tk.shape)
    return place_Tk, torch.tensor(ends, dtype=torch.int32, device=experts_Tk.device)


def permute_reference(x_TD: Tensor, place_Tk: Tensor, num_rows: int) -> Tensor:
    """Copy token t to the rows `place[t]`; the other rows are zero."""
    kept_Tk = place_Tk >= 0
    token_of_copy = kept_Tk.nonzero()[:, 0]
    return x_TD.new_zeros(num_rows, x_TD.shape[1]).index_put((place_Tk[kept_Tk],), x_TD[token_of_copy])


def unpermute_reference(y_SD: Tensor, weight_Tk: Tensor, place_Tk: Tensor) -> Tensor:
    """Add up a token's rows `place[t]`, each times its weight, in the order of j."""
    dropped_Tk = place_Tk < 0
    weight_Tk = weight_Tk.masked_fill(dropped_Tk, 0.0)
    rows_SD = torch.cat([y_SD, y_SD.new_zeros(1, y_SD.shape[1])]).to(compute_dtype(y_SD))
    place_Tk = place_Tk.masked_fill(dropped_Tk, len(y_SD))
    out_TD = rows_SD.new_zeros(len(place_Tk), y_SD.shape[1])
    for j in range(place_Tk.shape[1]):
        out_TD = out_TD + weight_Tk[:, j, None] * rows_SD[place_Tk[:, j]]
    return out_TD.to(y_SD.dtype)


def grouped_linear_reference(x_SF: Tensor, weight_XOF: Tensor, ends_X: Tensor) -> Tensor:
    """Multiply the rows of expert x by `weight[x]`; rows of no expert give zero."""
    ends = ends_X.tolist()
    parts = [x_SF[a:b] @ weight.t() for a, b, weight in zip([0, *ends[:-1]], ends, weight_XOF, strict=True)]
    return torch.cat([*parts, x_SF.new_zeros(len(x_SF) - ends[-1], weight_XOF.shape[1])])
