"""What is really sent: every collective and message that passes the dispatcher, counted beside the code that sends.

Bytes are those that this rank sends, by the least that an algorithm for n ranks can do; b is what the rank puts in:

| kind                          | bytes sent                        |
| ----------------------------- | --------------------------------- |
| all_gather                    | (n - 1) b, b this rank's part     |
| reduce_scatter                | (n - 1) / n b, b the whole buffer |
| all_reduce                    | 2 (n - 1) / n b                   |
| all_to_all                    | b without what stays here         |
| send                          | b                                 |
| recv, barrier                 | 0                                 |
| broadcast, scatter            | from the root (n - 1) b, else 0; scatter's b is one part |
| reduce, gather                | b, 0 from the root                |
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.lm import HybridLM
from .mesh import Mesh

Phase = Literal["forward", "backward", "between"]

# Operators of torch.distributed and of its functional collectives, by name without underscores at the ends.
KINDS = {
    "allgather": "all_gather",
    "allgather_base": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
    "isend": "send",
    "recv": "recv",
    "recv_any_source": "recv",
    "irecv": "recv",
    "broadcast": "broadcast",
    "scatter": "scatter",
    "reduce": "reduce",
    "gather": "gather",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
}
NOT_SENT = ("wait_tensor", "wrap_tensor_autograd", "check_for_nan")
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
INPUTS = ("input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors", "tensor")


@dataclass(frozen=True)
class Sent:
    """One collective or message.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce, send and so on.
        axis: the mesh axis it goes over, or "world", or the ranks where it is neither.
        block: what asks for it: `layers.3`, `embed`, `head`, for FSDP `root`, or "" outside the model.
        phase: the pass that it belongs to, or between passes; recomputation is part of the backward pass.
        sent: bytes this rank sends.
        peer: the rank of the group that a message goes to or comes from.
    """

    kind: str
    axis: str
    block: str
    phase: Phase
    sent: int
    peer: int | None = None


class Traffic(TorchDispatchMode):
    """Records in `sent` what this rank sends while it is entered, in order; groups of one rank send nothing.

    FSDP asks for a block's parameters while another block runs: what it sends belongs to the block it is sent for,
    which FSDP says in the names that it gives to the profiler.

    Args:
        mesh: names the groups.
        models: the model, or stages of it, whose blocks ask.
    """

    def __init__(self, mesh: Mesh, models: Iterable[HybridLM] = ()) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        self._models = list(models)
        self._axes = _axes_of_groups(mesh)
        self._hooks = ExitStack()
        self._inside: list[str] = []
        self._backward_block = ""
        self._labels: list[str] = []

    def __enter__(self) -> Self:
        """Begin to record."""
        for model in self._models:
            if model.is_last:
                self._watch(model, "head")
            for number, layer in model.layers.items():
                self._watch(layer, f"layers.{number}")
            if model.embed is not None:
                self._watch(model.embed, "embed")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop, and leave the model as it was."""
        super().__exit__(*error)
        self._hooks.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the operator run, and note what it sends."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own dispatch comes first, and what it sends comes here
        if func.namespace == "profiler":
            self._label(func, args)
        elif func.namespace in NAMESPACES:
            self._note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _watch(self, module: nn.Module, name: str) -> None:
        """Know when a module runs, forward, and from its output's gradient on, backward."""

        def enter(_module: nn.Module, _args: Any) -> None:
            self._inside.append(name)

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self._inside.pop()
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: setattr(self, "_backward_block", name))

        for handle in (module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave)):
            self._hooks.callback(handle.remove)

    def _label(self, func: Any, args: Any) -> None:
        if "enter" in func.__name__:
            self._labels.append(args[0])
        elif self._labels:
            self._labels.pop()

    def _where(self) -> tuple[str, Phase, bool]:
        """The block that asks now, in which pass, and whether it is FSDP that asks."""
        backward = torch._C._current_graph_task_id() != -1
        for label in reversed(self._labels):
            if label.startswith(("FSDP::all_gather", "FSDP::post_backward_reduce")):
                path = label.partition("(")[2].rstrip(")").split(".")
                late = backward or "backward" in label
                return ".".join(path[:2]) or "root", "backward" if late else "forward", True
        if backward:
            return self._backward_block, "backward", False
        return (self._inside[-1], "forward", False) if self._inside else ("", "between", False)

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.__name__.partition(".")[0].strip("_")
        if name in NOT_SENT:
            return
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if name == "batch_p2p_ops":
            for operator, peer, tensor in zip(given["op_list"], given["peer_list"], given["tensors"], strict=True):
                self._add(KINDS[operator], _group(given), {"tensors": [tensor], "dst": peer})
        elif name in KINDS:
            self._add(KINDS[name], _group(given), given)
        else:
            raise NotImplementedError(f"what does {func} send? Add it to KINDS in {__name__}")

    def _add(self, kind: str, group: dist.ProcessGroup, given: dict[str, Any]) -> None:
        if group.size() == 1:
            return
        block, phase, fsdp = self._where()
        names = self._axes.get(group.group_name, [])
        if not names:
            world = group.group_name == dist.group.WORLD.group_name  # type: ignore[union-attr]
            names = ["world" if world else str(dist.get_process_group_ranks(group))]
        # One group may be two axes: parameters lie on the first of them, tokens on the last.
        axis = names[0] if fsdp or phase == "between" else names[-1]
        peer = given.get("dst", given.get("src")) if kind in ("send", "recv") else None
        self.sent.append(Sent(kind, axis, block, phase, _bytes_sent(kind, given, group), peer))


def _axes_of_groups(mesh: Mesh) -> dict[str, list[str]]:
    """The axes of each group that has more than one rank, of parameters before those of tokens, experts' last."""
    found: dict[str, list[str]] = {}
    for part in (mesh.dense, mesh.tokens, *(() if mesh.experts is None else (mesh.experts,))):
        for axis in part.mesh_dim_names or ():
            names = found.setdefault(part.get_group(axis).group_name, [])
            # A group that is both fsdp and dp_shard moves parameters: rows are never sent.
            if part.get_group(axis).size() > 1 and axis not in names and not (names and axis == "dp_shard"):
                names.append(axis)
    return found


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    group = given["process_group"] if "process_group" in given else given["group_name"]
    if isinstance(group, str):
        return _resolve_process_group(group)  # type: ignore[arg-type]
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _bytes_sent(kind: str, given: dict[str, Any], group: dist.ProcessGroup) -> int:
    tensors = given[next(name for name in INPUTS if name in given)]
    mine = sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))
    ranks, root = group.size(), given.get("root_rank", given.get("src")) == group.rank()
    formulas: dict[str, Callable[[], int]] = {
        "all_gather": lambda: (ranks - 1) * mine,
        "reduce_scatter": lambda: mine * (ranks - 1) // ranks,
        "all_reduce": lambda: 2 * mine * (ranks - 1) // ranks,
        "all_to_all": lambda: mine - _stays(given, group, mine),
        "send": lambda: mine,
        "recv": lambda: 0,
        "barrier": lambda: 0,
        "broadcast": lambda: (ranks - 1) * mine if root else 0,
        "scatter": lambda: mine * (ranks - 1) // ranks if root else 0,
        "reduce": lambda: 0 if root else mine,
        "gather": lambda: 0 if root else mine,
    }
    return formulas[kind]()


def _stays(given: dict[str, Any], group: dist.ProcessGroup, mine: int) -> int:
    """Bytes of an all-to-all that go from this rank to itself."""
    parts = given.get("input_split_sizes") or [1] * group.size()
    if "input_tensors" in given:
        parts = [t.numel() for t in given["input_tensors"]]
    return mine * parts[group.rank()] // max(1, sum(parts))
