"""GrassWalk and GrassJump: random subspaces, moments that turn with them, and the rest of the gradient not lost.

Rajabi et al., arXiv:2510.01878. Every T updates the basis P (m, r) becomes another; with C = P_t^T P_{t-1}, hats for
moments corrected for their bias, and C^2, |.| elementwise, the moments turn as in LDAdam (arXiv:2410.16103):

    M_{t-1} <- C M_{t-1},   V_{t-1} <- (1 - b2^(t-1)) |C^2 (V^_{t-1} - M^_{t-1}^2) + (C M^_{t-1})^2|

Then R_t = P_t^T G_t, N_t = Adam(R_t), and what lies outside the subspace is added, scaled column by column
(recovery scaling) with its norm's growth limited by zeta:

    L_t = (G_t - P_t R_t) diag(|N_t[:, j]| / |R_t[:, j]|),   |L_t| <= zeta |L_{t-1}|
    W_t = W_{t-1} - lr alpha (P_t N_t + L_t)

Jump: P_t is the Q of a Gaussian matrix. Walk: from P along the geodesic of a random tangent D = (I - P P^T) X with
Gaussian X, D = U S V^T:

    P_t = P V cos(S h) V^T + U sin(S h) V^T

Assumed, for want of the paper's own numbers: h such that the largest angle S h is `walk_angle`, and GaLore's basis as
the first of the walk. State of a matrix: m r + 2 r n + 1 numbers.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .bases import orthonormal
from .layout import Kind
from .method import Now, State, SubspaceMethod


class _Grassmann(SubspaceMethod):
    """What the two have in common; slots as GaLore's, and the norm of the last rest."""

    slots: ClassVar[Mapping[str, Kind]] = {**SubspaceMethod.slots, "rest_norm": "matrices"}

    @abstractmethod
    def next_basis(self, grad_xsl: Tensor, basis_xsR: Tensor, number: int) -> Tensor:
        """The basis of a number, `(x, s, R)`, from the one before, zeros before the first. Collective."""

    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """Another basis, and the moments turned into it. Collective."""
        before_xsR = self.basis(state, now)
        after_xsR = self.next_basis(grad_xsl, before_xsR, now.number)
        changed = {"basis": self.layout.own_rank(after_xsR)}
        if now.number == 0:
            return changed
        change_xRR = self.layout.short.sum(after_xsR.mT @ before_xsR)
        first, second = (1 - beta ** (now.count - 1) for beta in self.betas)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        mean = m / first
        turned, spread = self.rotate(change_xRR, m), self.rotate(change_xRR.square(), v / second - mean.square())
        return changed | {"exp_avg": turned, "exp_avg_sq": (spread + (turned / first).square()).abs() * second}

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """See `Method.step`."""
        layout = self.layout
        changed = self.refresh(grad_xsl, state, now) if now.due else {}
        state = {**state, **changed}
        basis_xsR = self.basis(state, now)
        projected_xrl = self.project(basis_xsR, grad_xsl)
        inner_xrl, moments = self.adam(projected_xrl, state, now.count)
        both_2xrl = torch.stack((inner_xrl, projected_xrl))
        inner_xl, projected_xl = layout.short.sum(both_2xrl.square().sum(2)).sqrt()
        factor_xl = torch.where(projected_xl > 0, inner_xl / projected_xl, 0)
        rest_xsl = (grad_xsl - self.lift(basis_xsR, projected_xrl)) * factor_xl[:, None, :]
        norm_x = layout.sum_all(rest_xsl.square().sum((1, 2))).sqrt()
        last_x = state["rest_norm"]
        most_x = torch.where(last_x > 0, torch.minimum(norm_x, last_x * self.config.growth_limit), norm_x)
        limited_x = torch.where(norm_x > 0, most_x / norm_x, 0)
        update_xsl = self.lift(basis_xsR, inner_xrl) + rest_xsl * limited_x[:, None, None]
        rest_norm = torch.where(norm_x > 0, most_x, last_x)
        return update_xsl * self.config.scale, {**changed, **moments, "rest_norm": rest_norm}


class GrassJump(_Grassmann):
    """A subspace drawn anew each time. See the module."""

    def next_basis(self, grad_xsl: Tensor, basis_xsR: Tensor, number: int) -> Tensor:
        """See `_Grassmann.next_basis`; nothing is sent."""
        layout = self.layout
        drawn_XSR = self.draw(number, layout.X, layout.S, self.rank)
        return layout.own_rows(orthonormal(drawn_XSR[layout.own_stack]))


class GrassWalk(_Grassmann):
    """A subspace a little beside the last one. See the module."""

    def next_basis(self, grad_xsl: Tensor, basis_xsR: Tensor, number: int) -> Tensor:
        """See `_Grassmann.next_basis`."""
        layout = self.layout
        if number == 0:
            return layout.own_rows(self.leading(grad_xsl, number))
        drawn_xsR = layout.own(self.draw(number, layout.X, layout.S, self.rank))
        tangent_xsR = drawn_xsR - basis_xsR @ layout.short.sum(basis_xsR.mT @ drawn_xsR)
        # U sin(S h) V^T = D V (sin(S h) / S) V^T: the right singular vectors alone are needed.
        squares_xR, v_xRR = torch.linalg.eigh(layout.short.sum(tangent_xsR.mT @ tangent_xsR))
        sizes_xR = squares_xR.clamp(min=0).sqrt()
        largest_x1 = sizes_xR[:, -1:].clamp(min=torch.finfo(sizes_xR.dtype).tiny)
        angles_xR = self.config.walk_angle * sizes_xR / largest_x1
        # sin(a) / S, also where S is zero; torch.sinc(z) is sin(pi z) / (pi z).
        ahead_xR = torch.sinc(angles_xR / torch.pi) * self.config.walk_angle / largest_x1
        turn_xsR = (basis_xsR @ v_xRR) * angles_xR.cos()[:, None, :]
        turn_xsR = turn_xsR + (tangent_xsR @ v_xRR) * ahead_xR[:, None, :]
        return turn_xsR @ v_xRR.mT
