"""What every low-rank method is: choose a basis, project the gradient, update inside, lift.

Letters of dimensions are those of `layout.py`. Methods are written for one process; what they need of other ranks they
ask of the layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor

from .bases import leading_directions, sketch_size
from .config import LowRankConfig
from .layout import Kind, MatrixLayout

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Now:
    """Where in the run an update is.

    Attributes:
        number: of the basis that this update uses, from 0.
        due: whether this update is the first with it.
        count: updates so far with this one, float64 scalar on the device; skipped ones do not count.
        age: those of them with this basis.
        lr: learning rate of this update.
    """

    number: int
    due: bool
    count: Tensor
    age: Tensor
    lr: float


class Method(ABC):
    """A method on one parameter. Its functions have no side effects: new state is returned, not written.

    State begins as zeros: the first update chooses the first basis.

    Args:
        name: the parameter's, from which random numbers follow.
        layout: how it is cut.
        config: the method's numbers.
        betas, eps: of the inner Adam.
    """

    slots: ClassVar[Mapping[str, Kind]]
    integers: ClassVar[frozenset[str]] = frozenset()
    # Whether a basis lasts for `refresh_steps` updates, or is chosen once.
    refreshes: ClassVar[bool] = True
    needs_rank: ClassVar[bool] = True

    def __init__(
        self, name: str, layout: MatrixLayout, config: LowRankConfig, *, betas: tuple[float, float], eps: float
    ) -> None:
        self.name, self.layout, self.config, self.betas, self.eps = name, layout, config, betas, eps

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        return self.config.rank

    @abstractmethod
    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """The update `(x, s, l)`, to be subtracted times the learning rate, and the state that changes. Collective."""

    def draw(self, number: int, *shape: int, uniform: bool = False) -> Tensor:
        """Random numbers that depend on seed, parameter and `number` alone: normal, or uniform in [0, 1).

        A run's device must stay of one kind: the CPU draws others than a GPU.
        """
        text = f"{self.config.seed} {self.name} {number}"
        seed = int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")
        device = self.layout.parameter.device
        generator = torch.Generator(device).manual_seed(seed)
        fill = torch.rand if uniform else torch.randn
        return fill(shape, generator=generator, dtype=self.layout.dtype, device=device)

    def adam(self, grad: Tensor, state: State, count: Tensor) -> tuple[Tensor, State]:
        """Adam (arXiv:1412.6980, algorithm 1) on the moments `exp_avg` and `exp_avg_sq`; the update and new moments."""
        first, second = self.betas
        m = torch.lerp(grad, state["exp_avg"], first)
        v = torch.lerp(grad.square(), state["exp_avg_sq"], second)
        update = (m / (1 - first**count)) / ((v / (1 - second**count)).sqrt() + self.eps)
        return update, {"exp_avg": m, "exp_avg_sq": v}


class SubspaceMethod(Method):
    """A method with Adam's moments inside a subspace with a dense basis; what differs is how the basis is chosen.

    R_t = P_t^T G_t,   N_t = Adam(R_t),   W_t = W_{t-1} - lr scale P_t N_t
    """

    slots: ClassVar[Mapping[str, Kind]] = {"basis": "basis", "exp_avg": "moment", "exp_avg_sq": "moment"}

    @abstractmethod
    def refresh(self, grad_xsl: Tensor, state: State, now: Now) -> State:
        """The basis numbered `now.number`, and moments where they change with it. Collective."""

    def step(self, grad_xsl: Tensor, state: State, now: Now) -> tuple[Tensor, State]:
        """See `Method.step`."""
        changed = self.refresh(grad_xsl, state, now) if now.due else {}
        state = {**state, **changed}
        basis_xsR = self.basis(state, now)
        projected_xrl = self.project(basis_xsR, grad_xsl)
        inner_xrl, moments = self.adam(projected_xrl, state, now.count)
        return self.lift(basis_xsR, inner_xrl) * self.config.scale, {**changed, **moments}

    def basis(self, state: State, now: Now) -> Tensor:
        """The basis `(x, s, R)`. Collective."""
        return self.layout.whole_rank(state["basis"], self.rank)

    def project(self, basis_xsR: Tensor, grad_xsl: Tensor) -> Tensor:
        """This rank's stretch of the gradient inside the subspace, `(x, r, l)`. Collective."""
        return self.layout.short.scatter(basis_xsR.mT @ grad_xsl, 1)

    def lift(self, basis_xsR: Tensor, inner_xrl: Tensor) -> Tensor:
        """What lies in the subspace, `(x, s, l)`. Collective."""
        return basis_xsR @ self.layout.short.gather(inner_xrl, 1, self.rank)

    def rotate(self, change_xRR: Tensor, moment_xrl: Tensor) -> Tensor:
        """This rank's stretch of a moment after a map of the subspace. Collective."""
        whole_xRl = change_xRR @ self.layout.short.gather(moment_xrl, 1, self.rank)
        return whole_xRl[:, self.layout.short.stretch(self.rank)]

    def leading(self, grad_xsl: Tensor, number: int) -> Tensor:
        """The leading directions of a gradient, `(x, S, R)`. Collective."""
        layout = self.layout
        test_XLk = self.draw(number, layout.X, layout.L, sketch_size(self.rank, layout.S))
        return leading_directions(layout, grad_xsl, self.rank, test_XLk)

    def own_basis(self, whole_xSR: Tensor) -> Tensor:
        """This rank's part of a basis, `(x, s, r)`."""
        return self.layout.own_rank(self.layout.own_rows(whole_xSR))
