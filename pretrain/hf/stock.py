"""The stock Hugging Face classes a model can become, and which one fits a configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from ...errors import UserError
from ...model.config import ModelConfig
from .mapping import WeightNames
from .stock_jamba import Jamba
from .stock_mamba1 import Mamba
from .stock_paired import Bamba, GraniteMoeHybrid
from .stock_single import Mamba2, NemotronH


class StockClass(Protocol):
    """A stock class: what it can express, its config.json from our configuration and back, its tensor names."""

    model_type: str
    architecture: str
    names: WeightNames

    @property
    def kinds(self) -> Collection[str]:
        """The kinds of layers it has."""
        ...

    def problems(self, config: ModelConfig) -> list[str]:
        """What keeps the model from being expressed, each as "setting; remedy"; empty when it can be."""
        ...

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of config.json that say the architecture, for a configuration without problems."""
        ...

    def model_config(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Our configuration of a config.json. Raises `UserError` for what we do not offer."""
        ...


# In order of preference: the first that fits is used.
STOCK_CLASSES: tuple[StockClass, ...] = (Mamba2(), Mamba(), NemotronH(), GraniteMoeHybrid(), Bamba(), Jamba())


def choose_stock_class(config: ModelConfig) -> StockClass:
    """The stock class that computes exactly what `config` does.

    Raises:
        UserError: there is none; names what to change for the classes that come nearest.
    """
    refusals = {stock: stock.problems(config) for stock in STOCK_CLASSES}
    for stock, problems in refusals.items():
        if not problems:
            return stock
    # A kind of layer that a class lacks is further away than any number of options.
    distances = {stock: (len(set(config.kinds) - set(stock.kinds)), len(refusals[stock])) for stock in refusals}
    least = min(distances.values())
    nearest = [
        f"{stock.architecture} lacks {'; '.join(refusals[stock])}" for stock in refusals if distances[stock] == least
    ]
    raise UserError(f"no stock Hugging Face class computes this model; the nearest: {', or '.join(nearest)}")


def stock_class_of(fields: Mapping[str, Any], where: str) -> StockClass:
    """The stock class of a config.json. Raises `UserError` for classes we cannot read."""
    for stock in STOCK_CLASSES:
        if fields.get("model_type") == stock.model_type:
            return stock
    known = ", ".join(stock.model_type for stock in STOCK_CLASSES)
    raise UserError(f"{where}: model_type {fields.get('model_type')!r} cannot be read; known are {known}")
