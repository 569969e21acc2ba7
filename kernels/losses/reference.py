"""Output head and cross-entropy by definition, with the whole logits in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy_reference(
    x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum `-log softmax(x W^T)[target] + z_loss * logsumexp^2` over the targets; arguments as in
    `linear_cross_entropy`."""
    logits_TV = F.linear(x_TD, weight_VD)
    logits_TV = logits_TV if x_TD.dtype == torch.float64 else logits_TV.float()
    counted_T = target_T != ignore_index
    loss = F.cross_entropy(logits_TV, target_T, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits_TV.logsumexp(-1).square() * counted_T).sum()
    return loss, counted_T.sum()
