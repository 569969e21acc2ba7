"""First values: each a function of the parameter's name, the seed and the global shape only, whatever the layout."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """Every element `value`."""

    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class Normal:
    """Normal with mean zero and standard deviation `std`."""

    std: float

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        return torch.randn(shape, generator=generator) * self.std


@dataclass(frozen=True)
class Uniform:
    """Uniform in plus or minus `bound`."""

    bound: float

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        return (torch.rand(shape, generator=generator) * 2 - 1) * self.bound


@dataclass(frozen=True)
class UniformFanIn:
    """Uniform in plus or minus 1/sqrt(fan_in), fan_in being all dimensions but the first, or the last of a `stack`.

    With `residual`, divided by sqrt(number of residual layers), as the last matrix of a residual branch is in the
    released Mamba code (`rescale_prenorm_residual`, from GPT-2, Radford et al. 2019, section 2.3).
    """

    residual: bool = False
    stack: bool = False

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        bound = 1 / math.sqrt(math.prod(shape[2 if self.stack else 1 :]))
        return Uniform(bound / math.sqrt(depth) if self.residual else bound).draw(shape, generator, depth)


@dataclass(frozen=True)
class LogOfUniform:
    """The logarithm of a uniform draw in [low, high]: A_log of Mamba-2 (Dao and Gu 2024, A = -exp(A_log))."""

    low: float
    high: float

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        return (self.low + (self.high - self.low) * torch.rand(shape, generator=generator)).log()


@dataclass(frozen=True)
class LogOfCount:
    """The logarithms of 1, 2, 3, ... along the last dim: A_log of Mamba-1 (Gu and Dao 2023, section 3.6, S4D-Real)."""

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        return torch.arange(1.0, shape[-1] + 1).log().repeat(*shape[:-1], 1)


@dataclass(frozen=True)
class StepSizeBias:
    """Inverse softplus of a step size drawn log-uniformly in [dt_min, dt_max], at least dt_floor (Gu and Dao 2023)."""

    dt_min: float
    dt_max: float
    dt_floor: float

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """See InitRule.draw."""
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.exp(low + (high - low) * torch.rand(shape, generator=generator)).clamp(min=self.dt_floor)
        return dt + torch.log(-torch.expm1(-dt))


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the parameter's name and the seed only."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
