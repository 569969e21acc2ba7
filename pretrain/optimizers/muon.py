"""Muon: momentum, made orthogonal (Jordan et al. 2024; scaled as in arXiv:2502.16982)."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ...parallel.comm import gather_stack
from .config import MuonConfig
from .sharded import like_parameter, local_part

# Quintic whose iteration sends singular values in (0, 1] near 1 fast; they end within about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, iterations: int) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, to Newton-Schulz accuracy.

    Args:
        matrices: (..., rows, columns), any float dtype; the work is done in it.
        iterations: Newton-Schulz steps; five suffice.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.flatten(0, -3)
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).view(matrices.shape)


class Muon:
    """Muon over matrices and stacks of matrices; each rank orthogonalises its share of the whole ones.

    The update of a matrix is a function of the whole matrix, so momentum is gathered first; the result is
    the single-process update under any sharding. Collective in `step`.

    Args:
        parameters: name to parameter of two or more dimensions, plain or DTensor.
        config: Muon's numbers.
        weight_decay: decoupled decay of each parameter, by name.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], config: MuonConfig, *, weight_decay: Mapping[str, float]
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.weight_decay = weight_decay
        self.momentum = {name: torch.zeros_like(local_part(p)) for name, p in self.parameters.items()}
        self.by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self.parameters.items():
            self.by_shape[parameter.shape].append(name)

    def step(self, lr_scale: float, skip: torch.Tensor) -> None:
        """See `Optimizer.step`."""
        lr = self.config.lr * lr_scale
        keep = skip > 0
        for shape, names in self.by_shape.items():
            nesterov = [self._advance(name, keep) for name in names]
            size = 0.2 * max(shape[-2:]) ** 0.5
            for name, update in zip(names, self._orthogonal(names, nesterov), strict=True):
                local = local_part(self.parameters[name])
                decayed = local * (1.0 - lr * self.weight_decay[name])
                local.copy_(torch.where(keep, local, decayed.sub_(update, alpha=lr * size)))

    def _advance(self, name: str, keep: torch.Tensor) -> torch.Tensor:
        """Fold the gradient into the momentum; the look-ahead (Nesterov) momentum, whole."""
        parameter, momentum = self.parameters[name], self.momentum[name]
        grad = local_part(parameter.grad)  # type: ignore[arg-type]
        momentum.copy_(torch.where(keep, momentum, torch.lerp(grad, momentum, self.config.momentum)))
        ahead = like_parameter(torch.lerp(grad, momentum, self.config.momentum), parameter)
        return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead

    def _orthogonal(self, names: list[str], whole: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's part of each matrix of `whole`, orthogonalised; ranks share the matrices out. Collective."""
        first = self.parameters[names[0]]
        if not isinstance(first, DTensor):
            return list(orthogonalise(torch.stack(whole), self.config.iterations))
        axis = max(range(first.device_mesh.ndim), key=first.device_mesh.size)
        group, ranks = first.device_mesh.get_group(axis), first.device_mesh.size(axis)
        share = -(-len(whole) // ranks)
        start = first.device_mesh.get_local_rank(axis) * share
        mine = torch.zeros(share, *first.shape, dtype=whole[0].dtype, device=whole[0].device)
        if start < len(whole):
            chosen = torch.stack(whole[start : start + share])
            mine[: len(chosen)] = orthogonalise(chosen, self.config.iterations)
        parts = []
        for name, update in zip(names, gather_stack(mine, group), strict=False):
            p = self.parameters[name]
            assert isinstance(p, DTensor)
            parts.append(distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None).to_local())
        return parts

    def state(self) -> dict[str, torch.Tensor]:
        """See `Optimizer.state`."""
        return {f"momentum.{n}": like_parameter(self.momentum[n], p) for n, p in self.parameters.items()}
