"""What every kind of layer offers: the contract between a layer's own file and the rest of the model."""

from typing import Protocol

from torch import nn


class LayerConfig(Protocol):
    """The frozen dataclass of a layer kind. Nothing raises on construction: `problems` lists what is wrong."""

    def problems(self, d_model: int) -> list[str]:
        """Every broken rule as `field=value rule; remedy`; empty when the layer can be built."""
        ...

    def num_params(self, d_model: int) -> int:
        """Number of parameters, computed from the fields alone."""
        ...

    def num_active_params(self, d_model: int) -> int:
        """Number of parameters that one token meets."""
        ...

    def flops_per_token(self, d_model: int, L: int) -> int:
        """Training FLOPs per token at row length L; see `ModelConfig.flops_per_token` for what is counted."""
        ...

    def state_bytes(self, d_model: int, L: int, element_bytes: int) -> int:
        """Bytes of one sequence's decoding state after L tokens."""
        ...

    def build(self, d_model: int, norm_eps: float, layer_index: int) -> nn.Module:
        """The module, holding NaN; `layer_index` is its place in the whole model.

        Its forward maps `(B, L, D)` and a SequenceContext to `(B, L, D)`: no token sees a later one, nor one of another
        document, and carried state is read from and written to the context. `parameter_rules` name all parameters.
        """
        ...


def divisors(number: int) -> str:
    """The divisors of a positive number, for error messages."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def positive(config: object, *fields: str) -> list[str]:
    """A problem for each of the fields that is set and below one."""
    values = {name: getattr(config, name) for name in fields}
    return [
        f"{name}={value} must be at least 1; use a positive whole number"
        for name, value in values.items()
        if value is not None and value < 1
    ]
