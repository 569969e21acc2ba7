"""Online Subspace Descent: the basis follows the gradients by online principal component analysis, without an SVD.

Liang et al., arXiv:2408.12857, with Adam for both. G_t (m, n) lying down, F_t = G_t / |G_t|:

    R_t = P_t^T G_t,   W_{t+1} = W_t - lr alpha P_t Adam_W(R_t)
    L_t(P) = |P P^T F_t - F_t|^2 + lambda |P^T P - I|^2
    P_{t+1} = P_t - ratio lr Adam_P(dL_t/dP (P_t))

in Frobenius norms. With A = F F^T and S = P^T P, dL/dP = -4 A P + 2 A P S + 2 P (P^T A P) + 4 lambda P (S - I), whose
terms are products with r columns. The paper advises a ratio of 5. Ours: the first basis is GaLore's, and the basis has
no weight decay. State of a matrix: 3 m r + 2 r n numbers.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .layout import Kind
from .method import Now, State, SubspaceMethod


class OnlineSubspace(SubspaceMethod):
    """See the module."""

    slots: ClassVar[Mapping[str, Kind]] = {
        **SubspaceMethod.slots,
        "basis_exp_avg": "basis",
        "basis_exp_avg_sq": "basis",
    }
    refreshes: ClassVar[bool] = False

    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """The leading directions of the first gradient."""
        return {"basis": self.own_basis(self.leading(grad_xsl, now.number))}

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """The update in this basis, and the next basis."""
        state = {**state, **self.refresh(grad_xsl, state, now)} if now.due else state
        basis_xsR = self.basis(state, now)
        projected_xrl = self.project(basis_xsR, grad_xsl)
        inner_xrl, moments = self.adam(projected_xrl, state, now.count)
        # A basis of its own singular vectors is where the first gradient's loss has no slope but rounding errors, which
        # Adam would take for one.
        slope_xsR = self._slope(basis_xsR, projected_xrl, grad_xsl) * (not now.due)
        before = {slot: state[f"basis_{slot}"] for slot in ("exp_avg", "exp_avg_sq")}
        move_xsr, after = self.adam(self.layout.own_rank(slope_xsR), before, now.count)
        basis_xsr = state["basis"] - now.lr * self.config.basis_lr_ratio * move_xsr
        update = self.lift(basis_xsR, inner_xrl) * self.config.scale
        return update, {"basis": basis_xsr, **moments, **{f"basis_{slot}": value for slot, value in after.items()}}

    def _slope(self, basis_xsR: Tensor, projected_xrl: Tensor, grad_xsl: Tensor) -> Tensor:
        """dL/dP, `(x, s, R)`. Collective."""
        layout = self.layout
        squares_x = layout.sum_all(grad_xsl.square().sum((1, 2)))
        # The smallest normal number leaves an expert without tokens its zeros.
        squares_x11 = squares_x.clamp(min=torch.finfo(squares_x.dtype).tiny)[:, None, None]
        projected_xRl = layout.short.gather(projected_xrl, 1, self.rank)
        ap_xsR = layout.long.sum(grad_xsl @ projected_xRl.mT) / squares_x11
        pap_xRR = layout.long.sum(projected_xRl @ projected_xRl.mT) / squares_x11
        gram_xRR = layout.short.sum(basis_xsR.mT @ basis_xsR)
        identity = torch.eye(self.rank, dtype=gram_xRR.dtype, device=gram_xRR.device)
        pca_xsR = -4 * ap_xsR + 2 * (ap_xsR @ gram_xRR + basis_xsR @ pap_xRR)
        return pca_xsR + 4 * self.config.basis_penalty * (basis_xsR @ (gram_xRR - identity))
