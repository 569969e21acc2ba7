"""Flora: momentum compressed by a random matrix that is drawn again from its seed, never stored.

Hao, Cao and Mou, arXiv:2402.03293 (algorithm 2). With G_t (m, n) lying down, A_t (m, r) of numbers of variance 1 / r,
the same for T updates, so that E[A A^T] = I:

    M' = A_t^T A_{t-1} M_{t-1} when the matrix is new, else M_{t-1}
    M_t = b1 M' + (1 - b1) A_t^T G_t
    W_t = W_{t-1} - lr alpha U_t / RMS(U_t),   U_t = A_t M_t

The paper feeds U_t to Adafactor; ours is its root mean square alone, over the whole matrix, without factored second
moments. State of a matrix: r n numbers and no basis.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .layout import Kind
from .method import Now, State, SubspaceMethod


class Flora(SubspaceMethod):
    """See the module."""

    slots: ClassVar[Mapping[str, Kind]] = {"exp_avg": "moment"}

    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """The momentum carried over to the new random matrix. Collective."""
        if now.number == 0:
            return {}
        change_xRR = self._random(now.number).mT @ self._random(now.number - 1)
        return {"exp_avg": self.rotate(change_xRR[self.layout.own_stack], state["exp_avg"])}

    def basis(self, state: State, now: Now) -> Tensor:
        """The random matrix, drawn whole on every rank."""
        return self.layout.own(self._random(now.number))

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """See `Method.step`."""
        state = {**state, **self.refresh(grad_xsl, state, now)} if now.due else state
        basis_xsR = self.basis(state, now)
        momentum_xrl = torch.lerp(self.project(basis_xsR, grad_xsl), state["exp_avg"], self.betas[0])
        update_xsl = self.lift(basis_xsR, momentum_xrl)
        squares_x = self.layout.sum_all(update_xsl.square().sum((1, 2)))
        size_x = (squares_x / (self.layout.S * self.layout.L)).sqrt() + self.eps
        return update_xsl * (self.config.scale / size_x)[:, None, None], {"exp_avg": momentum_xrl}

    def _random(self, number: int) -> Tensor:
        """A of all matrices, `(X, S, R)`."""
        return self.draw(number, self.layout.X, self.layout.S, self.rank) * self.rank**-0.5
