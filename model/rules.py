"""What is said about every parameter, beside the module that owns it: its first value, its kind, how it may be cut.

A module declares `parameter_rules`, a dict from a parameter's name relative to the module (`"in_z.weight"`) to a
`ParameterRule`. The innermost module that names a parameter decides.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

# `experts` are stacks of matrices; `balance` is moved by the router itself, and by no optimizer.
ParameterKind = Literal["matrix", "experts", "router", "balance", "embedding", "head", "conv", "norm", "bias", "ssm"]
NO_DECAY_KINDS: frozenset[ParameterKind] = frozenset({"norm", "bias", "ssm", "balance"})


class InitRule(Protocol):
    """Draws a parameter's first value."""

    def draw(self, shape: torch.Size, generator: torch.Generator, depth: int) -> Tensor:
        """A float32 tensor of the whole parameter; `depth` is the number of residual layers of the model."""
        ...


@dataclass(frozen=True)
class ShardRule:
    """How tensor parallelism may cut a parameter.

    Args:
        dim: the tensor dimension that is cut; None keeps the parameter whole on every rank.
        unit: what may not be cut apart: `heads`, `groups`, `kv_heads`, `channels`, `hidden` or `vocabulary`.
        count: how many such units lie along `dim`.
        heads: how many heads use the units, neighbours the same one; for `groups` and `kv_heads`.
        experts: how many experts lie along dimension 0, which expert parallelism shares out; 0 where it is another's.
    """

    dim: int | None
    unit: str = ""
    count: int = 1
    heads: int = 0
    experts: int = 0


REPLICATED = ShardRule(None)


@dataclass(frozen=True)
class ParameterRule:
    """First value, kind (which optimizers and weight decay go by) and cutting rule of one parameter."""

    init: InitRule
    kind: ParameterKind
    shard: ShardRule


def collect_rules(model: nn.Module) -> dict[str, ParameterRule]:
    """The rule of every parameter of `model`, by full name.

    Raises:
        ValueError: naming each parameter without a rule, and each buffer (buffers are not used: nothing would
            initialise them after construction on the meta device).
    """
    modules = dict(model.named_modules())
    rules: dict[str, ParameterRule] = {}
    uncovered = [f"buffer {name}" for name, _ in model.named_buffers()]
    for name, _ in model.named_parameters():
        rule = _find_rule(modules, name)
        if rule is None:
            uncovered.append(f"parameter {name}")
        else:
            rules[name] = rule
    if uncovered:
        raise ValueError(f"no rule covers {', '.join(uncovered)}; declare it in the owner's `parameter_rules`")
    return rules


def _find_rule(modules: dict[str, nn.Module], name: str) -> ParameterRule | None:
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        declared = getattr(modules[".".join(parts[:cut])], "parameter_rules", {})
        if (relative := ".".join(parts[cut:])) in declared:
            return declared[relative]
    return None
