"""What mixture-of-experts layers stand on: tokens in the order of experts, the way back, and a product per expert."""

from .grouped import grouped_linear
from .operator import expert_order, permute, unpermute
from .reference import (
    expert_order_reference,
    grouped_linear_reference,
    permute_reference,
    unpermute_reference,
)

__all__ = [
    "expert_order",
    "expert_order_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "permute",
    "permute_reference",
    "unpermute",
    "unpermute_reference",
]
