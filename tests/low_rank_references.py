"""Low-rank methods on whole matrices, one at a time, written from their papers' equations and nothing of ours.

Exact singular value decompositions, autograd for the online principal component analysis, matrices written out: slow,
short, and for small matrices in float64.
"""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b

import torch
from torch import Tensor

from headrace.pretrain.optimizers.low_rank.config import LowRankConfig

BETAS, EPS = (0.9, 0.95), 1e-8
B1, B2 = BETAS


def random_numbers(seed: int, name: str, number: int, *shape: int, uniform: bool = False) -> Tensor:
    """What the optimizer draws, by its definition of seeds."""
    digest = blake2b(f"{seed} {name} {number}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return (torch.rand if uniform else torch.randn)(shape, generator=generator, dtype=torch.float64)


def numbers_of_matrix(seed: int, name: str, matrices: int, i: int, number: int, *shape: int, **kind: bool) -> Tensor:
    """Those of the i-th matrix of a stack."""
    return random_numbers(seed, name, number, matrices, *shape, **kind)[i]


class Matrix:
    """One matrix under one method: `step` takes a gradient that lies down and returns what to subtract.

    Args:
        draw: `(number, *shape)` to random numbers of this matrix.
    """

    def __init__(self, config: LowRankConfig, draw: Callable[..., Tensor]) -> None:
        self.config, self.draw = config, draw
        self.t = 0
        self.m = self.v = self.basis = self.before = self.mp = self.vp = None
        self.rest: Tensor | None = None

    def step(self, G: Tensor) -> Tensor:
        new = self.t % self.config.refresh_steps == 0
        number = self.t // self.config.refresh_steps
        self.t += 1
        return getattr(self, self.config.method)(G, new, number)

    def adam(self, R: Tensor, t: int) -> Tensor:
        if self.m is None:
            self.m, self.v = torch.zeros_like(R), torch.zeros_like(R)
        self.m = B1 * self.m + (1 - B1) * R
        self.v = B2 * self.v + (1 - B2) * R**2
        return self.m / (1 - B1**t) / (torch.sqrt(self.v / (1 - B2**t)) + EPS)

    def singular_vectors(self, G: Tensor) -> Tensor:
        U = torch.linalg.svd(G, full_matrices=False)[0][:, : self.config.rank].clone()
        for column in U.T:
            column *= torch.sign(column[column.abs().argmax()])
        return U

    def galore(self, G: Tensor, new: bool, number: int) -> Tensor:
        if new:
            self.basis = self.singular_vectors(G)
        P = self.basis
        return self.config.scale * P @ self.adam(P.T @ G, self.t)

    def online_subspace(self, G: Tensor, new: bool, number: int) -> Tensor:
        is_first = self.basis is None
        if is_first:
            self.basis = self.singular_vectors(G)
            self.mp, self.vp = torch.zeros_like(self.basis), torch.zeros_like(self.basis)
        P = self.basis.clone().requires_grad_()
        F, identity = G / G.norm(), torch.eye(P.shape[1], dtype=P.dtype)
        loss = (P @ P.T @ F - F).pow(2).sum() + self.config.basis_penalty * (P.T @ P - identity).pow(2).sum()
        (slope,) = torch.autograd.grad(loss, P)
        if is_first:  # at singular vectors it is zero, but for rounding that Adam would blow up
            assert slope.abs().max() < 1e-12
            slope = torch.zeros_like(slope)
        update = self.config.scale * self.basis @ self.adam(self.basis.T @ G, self.t)
        self.mp = B1 * self.mp + (1 - B1) * slope
        self.vp = B2 * self.vp + (1 - B2) * slope**2
        move = self.mp / (1 - B1**self.t) / (torch.sqrt(self.vp / (1 - B2**self.t)) + EPS)
        self.basis = self.basis - self.lr * self.config.basis_lr_ratio * move
        return update

    def grass(self, G: Tensor, new: bool, number: int) -> Tensor:
        r, norms = self.config.rank, G.norm(dim=1)
        if new:
            self.m = None
            self.start = self.t - 1
            if self.config.rows == "top":
                rows, rho = norms.argsort(descending=True)[:r], torch.ones(r, dtype=G.dtype)
            else:
                q = norms / norms.sum()
                rows = torch.tensor([int((u > q.cumsum(0)).sum()) for u in self.draw(number, r, uniform=True)])
                rho = 1 / (r * q[rows]).sqrt()
            B = torch.zeros(r, len(G), dtype=G.dtype)
            B[torch.arange(r), rows] = 1
            self.basis = (rho.diag() @ B).T
        return self.config.scale * self.basis @ self.adam(self.basis.T @ G, self.t - self.start)

    def flora(self, G: Tensor, new: bool, number: int) -> Tensor:
        shape = (len(G), self.config.rank)
        A = self.draw(number, *shape) / self.config.rank**0.5
        if self.m is None:
            self.m = torch.zeros(self.config.rank, G.shape[1], dtype=G.dtype)
        elif new:
            self.m = A.T @ (self.draw(number - 1, *shape) / self.config.rank**0.5) @ self.m
        self.m = B1 * self.m + (1 - B1) * A.T @ G
        U = A @ self.m
        return self.config.scale * U / (U.pow(2).mean().sqrt() + EPS)

    def grass_walk(self, G: Tensor, new: bool, number: int) -> Tensor:
        if new and number == 0:
            self.basis = self.singular_vectors(G)
        elif new:
            P = self.basis
            X = self.draw(number, *P.shape)
            U, S, Vh = torch.linalg.svd(X - P @ P.T @ X, full_matrices=False)
            h = self.config.walk_angle / S.max()
            self.turn(P @ Vh.T @ torch.cos(S * h).diag() @ Vh + U @ torch.sin(S * h).diag() @ Vh)
        return self.recovered(G)

    def grass_jump(self, G: Tensor, new: bool, number: int) -> Tensor:
        if new:
            Q, R = torch.linalg.qr(self.draw(number, len(G), self.config.rank))
            Q = Q * torch.sign(R.diagonal())
            if number == 0:
                self.basis = Q
            else:
                self.turn(Q)
        return self.recovered(G)

    def turn(self, basis: Tensor) -> None:
        C, t = basis.T @ self.basis, self.t - 1
        mean, square = self.m / (1 - B1**t), self.v / (1 - B2**t)
        self.v = (1 - B2**t) * (C**2 @ (square - mean**2) + (C @ mean) ** 2).abs()
        self.m = C @ self.m
        self.basis = basis

    def recovered(self, G: Tensor) -> Tensor:
        P = self.basis
        R = P.T @ G
        N = self.adam(R, self.t)
        rest = (G - P @ R) @ (N.norm(dim=0) / R.norm(dim=0)).diag()
        if self.rest is not None and rest.norm() > self.config.growth_limit * self.rest:
            rest = rest / rest.norm() * self.config.growth_limit * self.rest
        self.rest = rest.norm()
        return self.config.scale * (P @ N + rest)

    def sizes(self, G: Tensor) -> Tensor:
        self.v = (0 if self.v is None else B2 * self.v) + (1 - B2) * G.norm(dim=0) ** 2
        return torch.sqrt(self.v / (1 - B2**self.t)) + EPS

    def subset_norm(self, G: Tensor, new: bool, number: int) -> Tensor:
        self.m = (0 if self.m is None else B1 * self.m) + (1 - B1) * G
        return self.m / (1 - B1**self.t) / self.sizes(G)

    def subspace_momentum(self, G: Tensor, new: bool, number: int) -> Tensor:
        if new:
            self.basis, self.m, self.start = self.singular_vectors(G), 0, self.t - 1
        P = self.basis
        R = P.T @ G
        self.m = B1 * self.m + (1 - B1) * R
        return (P @ self.m / (1 - B1 ** (self.t - self.start)) + G - P @ R) / self.sizes(G)


def train(
    config: LowRankConfig,
    parameters: dict[str, Tensor],
    gradients: Sequence[dict[str, Tensor]],
    lr_scales: Sequence[float],
    weight_decay: float,
) -> dict[str, Tensor]:
    """The parameters after one update for each entry of `gradients`."""
    whole = {name: tensor.clone() for name, tensor in parameters.items()}
    for name, tensor in whole.items():
        stack = tensor if tensor.ndim == 3 else tensor[None]
        for i, W in enumerate(stack):
            draw = partial(numbers_of_matrix, config.seed, name, len(stack), i)
            matrix = Matrix(config, draw)
            for grads, scale in zip(gradients, lr_scales, strict=True):
                G = grads[name] if tensor.ndim == 2 else grads[name][i]
                matrix.lr = config.lr * scale
                tall = W.shape[0] > W.shape[1]
                update = matrix.step(G.T if tall else G)
                W -= matrix.lr * (weight_decay * W + (update.T if tall else update))
    return whole
