"""The state of one parameter: its tensors by slot, moments in full or as 8-bit codes, written only if not skipped."""

from typing import Literal

import torch
from torch import Tensor

from ....kernels.adamw_8bit import CodeBook, code_book
from ....parallel.comm import largest_of_each
from .layout import SCALE_COLUMNS, Kind
from .method import Method, State

TINY = torch.finfo(torch.float32).tiny


class Store:
    """This rank's part of a method's state; moments inside the subspace have 8 bits where asked for.

    A code stands for a value of the 8-bit AdamW's code books (arXiv:2110.02861) times the largest magnitude among
    `SCALE_COLUMNS` columns of the whole moment's row, so that no cut changes a code.

    Args:
        method: whose state it is.
        bits: of moments inside the subspace.
    """

    def __init__(self, method: Method, bits: Literal[32, 8]) -> None:
        self.layout, self.rank = method.layout, method.rank
        self.coded = {slot for slot, kind in method.slots.items() if kind == "moment" and bits == 8}
        self.plain = set(method.slots) - self.coded
        self.kinds: dict[str, Kind] = {}
        self.tensors: dict[str, Tensor] = {}
        for slot, kind in method.slots.items():
            if slot in self.coded:
                self._add(f"{slot}_codes", "moment", torch.uint8)
                self._add(f"{slot}_scales", "scales", torch.float32)
            else:
                self._add(slot, kind, torch.int64 if slot in method.integers else None)
        self.blocks_l = self.layout.own_long // SCALE_COLUMNS

    def read(self) -> State:
        """Every slot of the method."""
        found = {slot: tensor for slot, tensor in self.tensors.items() if slot in self.plain}
        for slot in self.coded:
            scales_xrl = self.tensors[f"{slot}_scales"][..., self.blocks_l]
            values = self._book(slot).lookup(self.tensors[f"{slot}_codes"]) * scales_xrl
            found[slot] = values.to(self.layout.dtype)
        return found

    def write(self, changed: State, keep: Tensor) -> None:
        """Take over what changed, unless `keep`. Collective where moments are coded and ranks cut their rows."""
        for slot, value in changed.items():
            coded = self._encode(slot, value) if slot in self.coded else {slot: value}
            for name, new in coded.items():
                old = self.tensors[name]
                old.copy_(torch.where(keep, old, new))

    def named(self, name: str) -> dict[str, Tensor]:
        """Whole tensors that share this state's memory, by `<slot>.<name>`."""
        return {
            f"{slot}.{name}": self.layout.as_whole(tensor, self.kinds[slot], self.rank)
            for slot, tensor in self.tensors.items()
        }

    def _add(self, slot: str, kind: Kind, dtype: torch.dtype | None) -> None:
        self.kinds[slot] = kind
        self.tensors[slot] = self.layout.zeros(kind, self.rank, dtype)

    def _encode(self, slot: str, moment_xrl: Tensor) -> dict[str, Tensor]:
        scales_xrb = torch.zeros_like(self.tensors[f"{slot}_scales"])
        index_xrl = self.blocks_l.expand(moment_xrl.shape)
        scales_xrb.scatter_reduce_(2, index_xrl, moment_xrl.abs().float(), "amax")
        for group in self.layout.long.groups:
            largest_of_each([scales_xrb], group)
        inverse_xrb = torch.where(scales_xrb < TINY, 0.0, scales_xrb.reciprocal())
        codes = self._book(slot).nearest((moment_xrl * inverse_xrb[..., self.blocks_l]).float())
        return {f"{slot}_codes": codes.to(torch.uint8), f"{slot}_scales": scales_xrb}

    def _book(self, slot: str) -> CodeBook:
        return code_book(slot != "exp_avg_sq", self.layout.parameter.device)
