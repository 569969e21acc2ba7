"""An exponential moving average of the weights (Polyak and Juditsky, 1992), kept beside them."""

from collections.abc import Mapping

import torch

from .optimizers.sharded import like_parameter, local_part


class WeightAverage:
    """After each update `average = decay * average + (1 - decay) * weights`, from the first weights on; in float32.

    Elementwise on each rank's own part: sharding does not change it.

    Args:
        parameters: name to parameter, plain or DTensor.
        decay: as above, between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.local = {name: local_part(p).float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, skip: torch.Tensor) -> None:
        """Take the weights in; where the device scalar `skip` is 1, the update was skipped and nothing changes."""
        weight = (1.0 - self.decay) * (1.0 - skip)
        for name, parameter in self.parameters.items():
            local = self.local[name]
            local.lerp_(local_part(parameter).to(local.dtype), weight.to(local.dtype))

    def state(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, sharded as the parameters are; loading writes into them."""
        return {name: like_parameter(self.local[name], parameter) for name, parameter in self.parameters.items()}
