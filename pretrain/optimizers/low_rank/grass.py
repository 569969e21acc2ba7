"""Grass: a subspace of few rows of the gradient, so that projecting and lifting are choosing and placing rows.

Muhamed et al., arXiv:2406.17660. With G_t (m, n) lying down, every T updates r rows are chosen, P^T = rho B, where B
selects them and rho is diagonal:

    top:      the r rows of largest norm, rho = I
    sampled:  r rows drawn with replacement by q_j = |G_j| / sum |G|, rho_kk = 1 / sqrt(r q_k)
    R_t = P^T G_t,   W_t = W_{t-1} - lr alpha P Adam(R_t)

The moments begin again with a new choice. State of a matrix: 2 r n + 2 r numbers; choosing needs only the m row norms
of other ranks. What the paper saves besides, reducing only chosen rows of gradients between replicas, is not done:
FSDP has reduced them before an optimizer sees them.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .layout import Kind
from .method import Method, Now, State


class Grass(Method):
    """See the module. Slots: `rows`, the chosen ones, `weights`, rho, and Adam's moments of those rows."""

    slots: ClassVar[Mapping[str, Kind]] = {
        "rows": "ranks",
        "weights": "ranks",
        "exp_avg": "moment",
        "exp_avg_sq": "moment",
    }
    integers: ClassVar[frozenset[str]] = frozenset({"rows"})

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """See `Method.step`."""
        changed = self.refresh(grad_xsl, state, now) if now.due else {}
        state = {**state, **changed}
        places_xR = self._places(state["rows"])
        projected_xRl = self._project(grad_xsl, places_xR, state["weights"])
        projected_xrl = self.layout.short.scatter(projected_xRl, 1)
        inner_xrl, moments = self.adam(projected_xrl, state, now.age)
        inner_xRl = self.layout.short.gather(inner_xrl, 1, self.rank)
        update_xsl = self._lift(grad_xsl, inner_xRl, places_xR, state)
        return update_xsl * self.config.scale, {**changed, **moments}

    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """Choose rows by this gradient. Collective."""
        own_norms_xs = self.layout.long.sum(grad_xsl.square().sum(2)).sqrt()
        norms_xS = self.layout.whole_short(own_norms_xs)
        if self.config.rows == "top":
            rows_xR = norms_xS.topk(self.rank, dim=1).indices
            weights_xR = torch.ones_like(state["weights"])
        else:
            norms_xS = norms_xS.clamp(min=torch.finfo(norms_xS.dtype).tiny)
            reached_xS = norms_xS.cumsum(1)
            drawn_xR = self.draw(now.number, self.layout.X, self.rank, uniform=True)[self.layout.own_stack]
            rows_xR = torch.searchsorted(reached_xS, drawn_xR * reached_xS[:, -1:]).clamp(max=self.layout.S - 1)
            chances_xR = norms_xS.gather(1, rows_xR) / norms_xS.sum(1, keepdim=True)
            weights_xR = (self.rank * chances_xR).rsqrt()
        again = {slot: torch.zeros_like(state[slot]) for slot in ("exp_avg", "exp_avg_sq")}
        return {"rows": rows_xR, "weights": weights_xR, **again}

    def _places(self, rows_xR: Tensor) -> Tensor:
        """Rows of all matrices of this rank that are the chosen ones, and for those it has not, how many it has."""
        own, matrices = self.layout.own_short, len(rows_xR)
        place_S = own.new_full((self.layout.S,), -1)
        place_S[own] = torch.arange(len(own), device=own.device)
        places_xR = place_S[rows_xR]
        before_x1 = torch.arange(matrices, device=own.device)[:, None] * len(own)
        return torch.where(places_xR < 0, matrices * len(own), places_xR + before_x1)

    def _project(self, grad_xsl: Tensor, places_xR: Tensor, weights_xR: Tensor) -> Tensor:
        """The chosen rows that this rank has, zeros for others."""
        matrices, s, length = grad_xsl.shape
        if s == 0:
            return grad_xsl.new_zeros(*places_xR.shape, length)
        rows = grad_xsl.reshape(matrices * s, length).index_select(0, places_xR.clamp(max=matrices * s - 1).flatten())
        weights_xR = weights_xR * (places_xR < matrices * s)
        return rows.view(*places_xR.shape, length) * weights_xR[..., None]

    def _lift(self, grad_xsl: Tensor, inner_xRl: Tensor, places_xR: Tensor, state: State) -> Tensor:
        """The update's rows on this rank."""
        rows_xR = state["rows"]
        # A row drawn several times has as many equal updates: each of them is written as their sum.
        times_xR = (rows_xR[:, :, None] == rows_xR[:, None, :]).sum(2)
        lifted_xRl = inner_xRl * (state["weights"] * times_xR)[..., None]
        matrices, s, length = grad_xsl.shape
        update = grad_xsl.new_zeros(matrices * s + 1, length)
        update.index_copy_(0, places_xR.flatten(), lifted_xRl.flatten(0, 1))
        return update[:-1].view(matrices, s, length)
