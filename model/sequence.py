"""What a layer may know about the tokens it is given beyond their vectors: documents, positions, carried state."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class LayerStates:
    """What a stream carries from one piece of its rows to the next: one group of named tensors per layer.

    A new object means "nothing came before". `HybridLM` updates it in place, so the same object is handed to the
    forward of every following piece. Rows are independent: each may start new documents at other tokens.
    """

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.position_B: Tensor | None = None

    def get(self, layer_index: int, name: str) -> Tensor | None:
        """The named tensor of a layer, or None before the first piece."""
        return self.layers.get(layer_index, {}).get(name)

    def put(self, layer_index: int, **tensors: Tensor) -> None:
        """Replace the named tensors of a layer."""
        self.layers.setdefault(layer_index, {}).update(tensors)

    def keep_last_keys(self, count: int) -> None:
        """Forget all but the last `count` tokens in attention layers; recurrent states keep what they hold."""
        for layer in self.layers.values():
            for name in ("keys", "values"):
                if name in layer and layer[name].shape[2] > count:
                    layer[name] = layer[name][:, :, layer[name].shape[2] - count :].clone()

    def num_bytes(self) -> int:
        """Bytes of all layers' tensors together."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.values())


@dataclass(eq=False)
class TrainingPass:
    """What layers may know of a training pass beside its tokens, and what they tell of it beside their output.

    Args:
        loss_scale: factor of the summed loss, a scalar tensor: terms that layers add to the loss take it too.
        number_BL: each token's number in the whole run, int64; -1 in rows that only fill a micro-batch up.
        told: numbers by layer. Recomputation tells the same once more, in the same place.
    """

    loss_scale: Tensor
    number_BL: Tensor
    told: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SequenceContext:
    """Document starts and carried state of a batch of rows; `SequenceContext()` is one document per row, no past.

    Args:
        reset_BL: bool, True at the first token of each document; None when only the rows' starts begin documents.
            A row whose first token is not marked continues the stream in `states`, or starts from zero state.
        states: carried state of a stream (decoding, or a long document in pieces); None in training.
        training: the training pass that this is; None in evaluation.
    """

    reset_BL: Tensor | None = None
    states: LayerStates | None = None
    training: TrainingPass | None = None
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()` once per context: what all layers of a forward pass need alike (masks, rotary tables)."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def enter(self, rows: int, length: int) -> None:
        """Note the shape of the tokens that the pass begins with.

        Raises:
            ValueError: the context has served another pass; a stream of `states` alone goes on with the same one.
        """
        if "shape" in self._shared:
            raise ValueError("a sequence context serves one forward pass; make another for the next")
        self._shared["shape"] = rows, length

    @property
    def shape(self) -> tuple[int, int]:
        """B and L of the pass that is going on; between layers, tensor parallelism holds only a part of its tokens."""
        return self._shared["shape"]

    @property
    def one_document(self) -> bool:
        """Whether every row is one document with nothing before it, so that plain causal order says all."""
        return self.reset_BL is None and (self.states is None or self.states.position_B is None)

    def position_BL(self, length: int, device: torch.device) -> Tensor:  # noqa: N802
        """Position of each token in its document, int64; (1, L) when all rows are alike."""
        return self.shared(("position", length), lambda: self._position(length, device))

    def _position(self, length: int, device: torch.device) -> Tensor:
        index_L = torch.arange(length, device=device)
        past_B = None if self.states is None else self.states.position_B
        first_B1 = torch.zeros(1, 1, dtype=torch.long, device=device) if past_B is None else -past_B[:, None]
        if self.reset_BL is None:
            return index_L - first_B1
        # The index of the latest document start at or before each token; before any, that of the carried document.
        start_BL = torch.where(self.reset_BL, index_L, first_B1).cummax(1).values
        return index_L - start_BL

    def advance(self, length: int, device: torch.device, rows: int) -> None:
        """Note in `states`, where there are any, that these tokens have passed; the context may then be used again."""
        if self.states is not None:
            last_B = self.position_BL(length, device)[:, -1]
            self.states.position_B = (last_B + 1).expand(rows)
            self._shared.clear()
