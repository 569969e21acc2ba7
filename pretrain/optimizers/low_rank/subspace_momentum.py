"""Subset-Norm with Subspace-Momentum: momentum inside a subspace, plain gradients outside of it.

Nguyen and Nguyen, arXiv:2411.07120 (AdamSNSM), with GaLore's basis. v_t[j] is `subset_norm`'s; with G_t (m, n) lying
down and P of T updates:

    M_t = b1 M_{t-1} + (1 - b1) P^T G_t
    D_t = P M^_t + (G_t - P P^T G_t)
    W_t[:, j] = W_{t-1}[:, j] - lr D_t[:, j] / (sqrt(v^_t[j]) + eps)

The momentum begins again with a new basis, and its bias correction with it: what comes from outside the subspace has
no bias and is not corrected (the paper has none; its published code corrects all by the number of updates).
State of a matrix: m r + r n + n numbers; with r = m / 4, as in the paper, a fifth of Adam's.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .layout import Kind
from .method import Now, State, SubspaceMethod
from .subset_norm import SubsetNorm


class SubspaceMomentum(SubspaceMethod, SubsetNorm):
    """See the module."""

    slots: ClassVar[Mapping[str, Kind]] = {"basis": "basis", "exp_avg": "moment", "exp_avg_sq": "columns"}
    refreshes: ClassVar[bool] = True
    needs_rank: ClassVar[bool] = True

    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """The leading directions of this gradient, and no momentum yet."""
        basis = self.own_basis(self.leading(grad_xsl, now.number))
        return {"basis": basis, "exp_avg": torch.zeros_like(state["exp_avg"])}

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """See `Method.step`."""
        changed = self.refresh(grad_xsl, state, now) if now.due else {}
        state = {**state, **changed}
        basis_xsR = self.basis(state, now)
        projected_xrl = self.project(basis_xsR, grad_xsl)
        m_xrl = torch.lerp(projected_xrl, state["exp_avg"], self.betas[0])
        v_xl, sizes_xl = self.subset_norms(grad_xsl, state, now)
        more_xrl = m_xrl / (1 - self.betas[0] ** now.age) - projected_xrl
        update_xsl = (grad_xsl + self.lift(basis_xsR, more_xrl)) / sizes_xl[:, None, :]
        return update_xsl, {**changed, "exp_avg": m_xrl, "exp_avg_sq": v_xl}
