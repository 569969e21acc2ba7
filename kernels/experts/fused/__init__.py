"""Expert layers on a GPU: rows moved token by token, and products whose tiles find their expert on the device."""

from .grouped import grouped_linear, grouped_weight_gradient
from .rows import combine_rows, order_copies, spread_rows, unpermute_backward

__all__ = [
    "combine_rows",
    "grouped_linear",
    "grouped_weight_gradient",
    "order_copies",
    "spread_rows",
    "unpermute_backward",
]
