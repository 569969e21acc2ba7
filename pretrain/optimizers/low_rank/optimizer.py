"""The optimizer around a low-rank method: which updates are due, skipping, weight decay, and the state by name."""

from collections.abc import Mapping

import torch

from ....errors import UserError
from ..sharded import local_part
from .clock import RefreshClock
from .config import LowRankConfig, MethodName
from .flora import Flora
from .galore import GaLore
from .grass import Grass
from .grassmann import GrassJump, GrassWalk
from .layout import MatrixLayout
from .method import Method, Now
from .online_subspace import OnlineSubspace
from .store import Store
from .subset_norm import SubsetNorm
from .subspace_momentum import SubspaceMomentum

METHODS: dict[MethodName, type[Method]] = {
    "galore": GaLore,
    "online_subspace": OnlineSubspace,
    "grass": Grass,
    "flora": Flora,
    "grass_walk": GrassWalk,
    "grass_jump": GrassJump,
    "subset_norm": SubsetNorm,
    "subspace_momentum": SubspaceMomentum,
}


class LowRank:
    """A low-rank method over matrices and stacks of them, the same update under every sharding. Collective in `step`.

    Args:
        parameters: name to parameter of two or three dimensions, plain or DTensor.
        config: method and numbers.
        betas, eps: of the inner Adam.
        weight_decay: decoupled decay of each parameter, by name.

    Raises:
        UserError: the rank is above a matrix's smaller size.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        config: LowRankConfig,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Mapping[str, float],
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.weight_decay = weight_decay
        kind = METHODS[config.method]
        if kind.needs_rank:
            check_rank(self.parameters, config)
        self.methods = {
            name: kind(name, MatrixLayout(p), config, betas=betas, eps=eps) for name, p in self.parameters.items()
        }
        self.stores = {name: Store(method, config.state_bits) for name, method in self.methods.items()}
        first = next(iter(self.parameters.values()))
        self.clock = RefreshClock(config.refresh_steps if kind.refreshes else None, first.device)

    @torch.no_grad()
    def step(self, lr_scale: float, skip: torch.Tensor) -> None:
        """See `Optimizer.step`. The host waits for the device only as `RefreshClock` says."""
        lr = self.config.lr * lr_scale
        keep = skip > 0
        number, due = self.clock.next()
        count, age = self.clock.count.double() + 1, self.clock.age(number) + 1
        now = Now(number=number, due=due, count=count, age=age, lr=lr)
        for name, method in self.methods.items():
            parameter = self.parameters[name]
            assert parameter.grad is not None
            # Decompositions raise for what is not finite; what a skipped update makes of zeros is not kept.
            grad = method.layout.lying(local_part(parameter.grad)).masked_fill(keep, 0).to(method.layout.dtype)
            update, changed = method.step(grad, self.stores[name].read(), now)
            weights = method.layout.lying(local_part(parameter))
            after = (weights.to(method.layout.dtype) * (1.0 - lr * self.weight_decay[name])).sub_(update, alpha=lr)
            weights.copy_(torch.where(keep, weights, after.to(weights.dtype)))
            self.stores[name].write(changed, keep)
        self.clock.count += ~keep

    def state(self) -> dict[str, torch.Tensor]:
        """See `Optimizer.state`; `step` is one tensor under every name."""
        found: dict[str, torch.Tensor] = {}
        for name, store in self.stores.items():
            found |= {f"step.{name}": self.clock.count, **store.named(name)}
        return found


def check_rank(parameters: Mapping[str, torch.Tensor], config: LowRankConfig) -> None:
    """Whether every matrix has room for the subspace.

    Raises:
        UserError: naming the matrix with least.
    """
    name, parameter = min(parameters.items(), key=lambda item: min(item[1].shape[-2:]))
    rows, columns = parameter.shape[-2:]
    if config.rank > min(rows, columns):
        raise UserError(
            f"optimizer.low_rank.rank={config.rank} is above the smaller size of {name} ({rows} x {columns}); set it "
            f"to {min(rows, columns)} or less, or optimizer.low_rank.min_side={config.rank} to leave such matrices to "
            "AdamW",
            everywhere=True,
        )
