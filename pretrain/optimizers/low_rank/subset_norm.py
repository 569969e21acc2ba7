"""Subset-Norm: one step size for each column of a matrix lying down, from the norm of the column's gradient.

Nguyen and Nguyen, arXiv:2411.07120, in Adam's form (AdamSN) with the paper's simple partition: a subset is what lies
along the shorter side. With G_t (m, n), m <= n:

    M_t = b1 M_{t-1} + (1 - b1) G_t
    v_t[j] = b2 v_{t-1}[j] + (1 - b2) |G_t[:, j]|^2
    W_t[:, j] = W_{t-1}[:, j] - lr M^_t[:, j] / (sqrt(v^_t[j]) + eps)

with hats for Adam's bias correction. A column's squares are summed, not averaged, so a learning rate about ten times
AdamW's fits. State of a matrix: m n + n numbers, half of Adam's; `subspace_momentum` is for less.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .layout import Kind
from .method import Method, Now, State


class SubsetNorm(Method):
    """See the module."""

    slots: ClassVar[Mapping[str, Kind]] = {"exp_avg": "whole", "exp_avg_sq": "columns"}
    refreshes: ClassVar[bool] = False
    needs_rank: ClassVar[bool] = False

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """See `Method.step`."""
        m_xsl = torch.lerp(grad_xsl, state["exp_avg"], self.betas[0])
        v_xl, sizes_xl = self.subset_norms(grad_xsl, state, now)
        update_xsl = m_xsl / (1 - self.betas[0] ** now.count) / sizes_xl[:, None, :]
        return update_xsl, {"exp_avg": m_xsl, "exp_avg_sq": v_xl}

    def subset_norms(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, Tensor]:
        """The new second moment of each column, and what to divide its update by. Collective."""
        second = self.betas[1]
        squares_xl = self.layout.short.sum(grad_xsl.square().sum(1))
        v_xl = torch.lerp(squares_xl, state["exp_avg_sq"], second)
        return v_xl, (v_xl / (1 - second**now.count)).sqrt() + self.eps
