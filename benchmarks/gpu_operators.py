"""Every operator as one kind of problem: tensors, a call by backend, PyTorch's own way, and sizes to judge it at."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

Outputs = tuple[Tensor, ...]
EPS = 1e-5


@dataclass
class Problem:
    """One call of an operator.

    Attributes:
        tensors: leaves by name, in the order of `call`; None where they are left out.
        call: `call(backend, *tensors)` gives the outputs that have gradients.
        outputs: their names.
        trained: how many of the outputs get a gradient in training, the first ones.
        per_token: names of leaves and outputs that have one entry a token, along dimension 1.
        native: the same by PyTorch's own operators, or None.
        reset: where documents start, for rivals that take it.
        flops: operations of forward and backward together where arithmetic and not memory is the limit, or 0.
        traffic: bytes that forward and backward must move, where they are not all leaves and outputs.
    """

    tensors: dict[str, Tensor | None]
    call: Callable[..., Outputs]
    outputs: tuple[str, ...]
    trained: int = 1
    per_token: tuple[str, ...] = ()
    native: Callable[..., Outputs] | None = None
    reset: Tensor | None = None
    flops: int = 0
    traffic: tuple[int, int] | None = None


@dataclass(frozen=True)
class Operator:
    """How to make problems of an operator, `make(device, dtype, sizes, everything)`, and of which sizes.

    `dry` is for the interpreter, `exact` for comparisons with float64, `timed` for the clock, `beyond` for tensors of
    more than 2**31 elements (none where that cannot be judged by a part). `everything` adds states and resets.
    """

    name: str
    make: Callable[[str, torch.dtype, tuple[int, ...], bool], Problem]
    dry: tuple[int, ...]
    exact: tuple[int, ...]
    timed: tuple[tuple[int, ...], ...]
    beyond: tuple[tuple[int, ...], ...] = field(default=())


def normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values, drawn in `dtype`."""
    return torch.randn(shape, device=device, dtype=dtype)


def documents(device: str, B: int, L: int) -> Tensor:
    """A mask of document starts: one in every row, two in the last."""
    reset = torch.zeros(B, L, dtype=torch.bool, device=device)
    reset[:, L // 3] = True
    reset[-1, L // 2 + 1] = True
    return reset


def step_sizes(device: str, *shape: int) -> Tensor:
    """Step sizes as Mamba starts with: their logarithms are uniform between those of 0.001 and 0.1."""
    low, high = math.log(1e-3), math.log(1e-1)
    return (torch.rand(shape, device=device) * (high - low) + low).exp()


def _ssd(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import ssd_scan

    B, L, H, P, G, N = sizes
    reset = documents(device, B, L) if everything else None
    tensors = {
        "x": normal(device, dtype, B, L, H, P),
        "dt": step_sizes(device, B, L, H),
        "A": -1 - 15 * torch.rand(H, device=device),
        "B": normal(device, dtype, B, L, G, N),
        "C": normal(device, dtype, B, L, G, N),
        "D": normal(device, torch.float32, H),
        "initial_state": normal(device, torch.float32, B, H, P, N) if everything else None,
    }

    def call(backend: str, *t: Tensor) -> Outputs:
        return ssd_scan(*t[:6], initial_state=t[6], reset=reset, backend=backend)

    return Problem(tensors, call, ("y", "final_state"), per_token=("x", "dt", "B", "C", "y"), reset=reset)


def _selective_scan(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import selective_scan

    B, L, width, N = sizes
    reset = documents(device, B, L) if everything else None
    tensors = {
        "x": normal(device, dtype, B, L, width),
        "dt": step_sizes(device, B, L, width).to(dtype),
        "A": -1 - 15 * torch.rand(width, N, device=device),
        "B": normal(device, dtype, B, L, N),
        "C": normal(device, dtype, B, L, N),
        "D": normal(device, torch.float32, width),
        "initial_state": normal(device, torch.float32, B, width, N) if everything else None,
    }

    def call(backend: str, *t: Tensor) -> Outputs:
        return selective_scan(*t[:6], initial_state=t[6], reset=reset, backend=backend)

    return Problem(tensors, call, ("y", "final_state"), per_token=("x", "dt", "B", "C", "y"), reset=reset)


def _conv1d(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import causal_conv1d

    B, L, D, K = sizes
    reset = documents(device, B, L) if everything else None
    tensors = {
        "x": normal(device, dtype, B, L, D),
        "weight": normal(device, torch.float32, D, K),
        "bias": normal(device, torch.float32, D),
        "initial_state": normal(device, dtype, B, K - 1, D) if everything else None,
    }

    def call(backend: str, x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> Outputs:
        return causal_conv1d(x, weight, bias, initial_state=initial, reset=reset, backend=backend)

    def native(x: Tensor, weight: Tensor, bias: Tensor, _: None) -> Outputs:
        taps, offset = weight.to(x.dtype)[:, None], bias.to(x.dtype)
        y_BDL = F.conv1d(x.transpose(1, 2), taps, offset, padding=K - 1, groups=D)[..., :L]
        return (F.silu(y_BDL).transpose(1, 2),)

    return Problem(tensors, call, ("y", "final_state"), per_token=("x", "y"), native=native, reset=reset)


def _rms_norm(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import rms_norm

    B, L, D = sizes
    tensors = {"x": normal(device, dtype, B, L, D), "weight": normal(device, torch.float32, D)}

    def call(backend: str, x: Tensor, weight: Tensor) -> Outputs:
        return (rms_norm(x, weight, EPS, backend=backend),)

    def native(x: Tensor, weight: Tensor) -> Outputs:
        return (F.rms_norm(x, (D,), weight.to(x.dtype), EPS),)

    return Problem(tensors, call, ("y",), per_token=("x", "y"), native=native)


def _gated_norm(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import gated_rms_norm

    B, L, D, groups = sizes
    x, z = normal(device, dtype, B, L, D), normal(device, dtype, B, L, D)

    def call(backend: str, x: Tensor, z: Tensor, weight: Tensor) -> Outputs:
        return (gated_rms_norm(x, z, weight, EPS, group_size=D // groups, backend=backend),)

    def native(x: Tensor, z: Tensor, weight: Tensor) -> Outputs:
        gated = (x * F.silu(z)).unflatten(-1, (groups, -1))
        return (F.rms_norm(gated, (D // groups,), None, EPS).flatten(-2) * weight.to(x.dtype),)

    tensors = {"x": x, "z": z, "weight": normal(device, torch.float32, D)}
    return Problem(tensors, call, ("y",), per_token=("x", "z", "y"), native=native)


def _add_norm(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import add_rms_norm

    B, L, D = sizes
    tensors = {
        "x": normal(device, torch.float32, B, L, D),
        "update": normal(device, dtype, B, L, D),
        "weight": normal(device, dtype, D),
    }

    def call(backend: str, x: Tensor, update: Tensor, weight: Tensor) -> Outputs:
        return add_rms_norm(x, update, weight, EPS, backend=backend)

    def native(x: Tensor, update: Tensor, weight: Tensor) -> Outputs:
        total = x + update
        return F.rms_norm(total, (D,), weight.float(), EPS).to(weight.dtype), total

    names = ("normed", "sum")
    return Problem(tensors, call, names, trained=2, per_token=("x", "update", *names), native=native)


def _swiglu(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import swiglu

    tensors: dict[str, Tensor | None] = {name: normal(device, dtype, *sizes) for name in ("gate", "up")}

    def call(backend: str, gate: Tensor, up: Tensor) -> Outputs:
        return (swiglu(gate, up, backend=backend),)

    def native(gate: Tensor, up: Tensor) -> Outputs:
        return (F.silu(gate) * up,)

    return Problem(tensors, call, ("y",), per_token=("gate", "up", "y"), native=native)


def _adamw_8bit(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    """One update of a parameter `(R, C)`, on a copy of it; for the harness with the gradient of a sum."""
    from headrace.kernels.adamw_8bit import BlockGrid, Moments, Update, adamw_8bit_

    rows, columns = sizes
    grid = BlockGrid.whole(columns, 256)
    moments = Moments.zeros(rows, columns, grid.num_blocks, torch.device(device))
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    update = Update(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=one, skip=zero)
    tensors: dict[str, Tensor | None] = {name: normal(device, dtype, *sizes) for name in ("p", "grad")}

    def call(backend: str, p: Tensor, grad: Tensor) -> Outputs:
        for moment in moments:
            moment.zero_()
        new = p.detach().clone()
        adamw_8bit_(new, grad.detach(), moments, update, grid=grid, backend=backend)
        return (new + (p - p.detach()) + (grad - grad.detach()),)

    # Parameter, gradient and codes are read, all but the gradient written; scales are a thousandth of that.
    traffic = rows * columns * (3 * dtype.itemsize + 4), 0
    return Problem(tensors, call, ("p",), traffic=traffic)


def _cross_entropy(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import linear_cross_entropy

    T, D, V = sizes
    target = torch.randint(V, (T,), device=device)
    target[:: max(2, T // 8)] = -100
    tensors = {"x": normal(device, dtype, T, D), "weight": normal(device, dtype, V, D) / math.sqrt(D)}

    def call(backend: str, x: Tensor, weight: Tensor) -> Outputs:
        z_loss = 1e-4 if everything else 0.0
        return (linear_cross_entropy(x, weight, target, z_loss=z_loss, backend=backend)[0],)

    def native(x: Tensor, weight: Tensor) -> Outputs:
        return (F.cross_entropy(F.linear(x, weight).float(), target, reduction="sum"),)

    return Problem(tensors, call, ("loss",), native=native, flops=6 * T * D * V)


def _embedding(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import embedding

    T, V, D = sizes
    # As in text: the n-th token is about 1/n as frequent as the first.
    tokens = (V ** torch.rand(1, T, device=device, dtype=torch.float64)).long().clamp_(max=V) - 1
    weight = normal(device, dtype, V, D)
    rows, table = T * D * weight.element_size(), weight.numel() * weight.element_size()

    def call(backend: str, weight: Tensor) -> Outputs:
        return (embedding(tokens, weight, backend=backend),)

    def native(weight: Tensor) -> Outputs:
        return (F.embedding(tokens, weight),)

    return Problem({"weight": weight}, call, ("y",), native=native, traffic=(2 * rows, rows + table))


def _experts(device: str, T: int, copies: int, X: int) -> Tensor:
    """Which experts tokens choose, some far more often than others; a few copies go nowhere."""
    chosen = (X ** torch.rand(T, copies, device=device, dtype=torch.float64)).long().clamp_(max=X) - 1
    return chosen.masked_fill(torch.rand(T, copies, device=device) < 0.02, -1)


def _permute(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import expert_order, permute

    T, copies, X, D = sizes
    experts = _experts(device, T, copies, X)

    def call(backend: str, x: Tensor) -> Outputs:
        place, _ = expert_order(experts, X, backend=backend)
        return (permute(x, place, T * copies, backend=backend),)

    return Problem({"x": normal(device, dtype, T, D)}, call, ("rows",))


def _unpermute(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import expert_order, unpermute

    T, copies, X, D = sizes
    place, _ = expert_order(_experts(device, T, copies, X), X, backend="torch")
    tensors = {
        "y": normal(device, dtype, T * copies, D),
        "weight": normal(device, torch.float32, T, copies).softmax(-1),
    }

    def call(backend: str, y: Tensor, weight: Tensor) -> Outputs:
        return (unpermute(y, weight, place, backend=backend),)

    return Problem(tensors, call, ("out",))


def _grouped_linear(device: str, dtype: torch.dtype, sizes: tuple[int, ...], everything: bool) -> Problem:
    from headrace.kernels import expert_order, grouped_linear

    S, X, O, F_ = sizes  # noqa: E741
    _, ends = expert_order(_experts(device, S, 1, X), X, backend="torch")
    tensors = {"x": normal(device, dtype, S, F_), "weight": normal(device, dtype, X, O, F_) / math.sqrt(F_)}

    def call(backend: str, x: Tensor, weight: Tensor) -> Outputs:
        return (grouped_linear(x, weight, ends, backend=backend),)

    def native(x: Tensor, weight: Tensor) -> Outputs:
        return (F.grouped_mm(x, weight.mT, offs=ends),)

    # PyTorch's own takes gradients that lie as they are; it knows no other dtype, and leaves rows of nobody unwritten.
    return Problem(tensors, call, ("y",), native=native if dtype == torch.bfloat16 else None, flops=6 * S * O * F_)


SSD = Operator(
    "ssd_scan",
    _ssd,
    dry=(1, 40, 2, 16, 1, 16),
    exact=(2, 512, 8, 64, 2, 128),
    timed=((8, 2048, 80, 64, 1, 128), (4, 4096, 128, 64, 8, 128), (1, 65536, 128, 64, 8, 128)),
    beyond=((1, (1 << 19) + 4096, 64, 64, 1, 64), (258, 2048, 64, 64, 1, 64)),
)
OPERATORS = [
    SSD,
    Operator(
        "selective_scan",
        _selective_scan,
        dry=(1, 10, 8, 4),
        exact=(2, 512, 256, 16),
        timed=((4, 2048, 5120, 16),),
    ),
    Operator(
        "causal_conv1d",
        _conv1d,
        dry=(1, 10, 32, 4),
        exact=(2, 512, 512, 4),
        timed=((4, 4096, 6144, 4),),
        beyond=((1, (1 << 19) + 4096, 4096, 4),),
    ),
    Operator(
        "rms_norm",
        _rms_norm,
        dry=(1, 8, 64),
        exact=(2, 512, 2048),
        timed=((4, 4096, 2048),),
        beyond=((1, (1 << 19) + 4096, 4096),),
    ),
    Operator(
        "gated_rms_norm",
        _gated_norm,
        dry=(1, 8, 64, 2),
        exact=(2, 512, 2048, 8),
        timed=((4, 4096, 4096, 1), (4, 4096, 8192, 8)),
        beyond=((1, (1 << 19) + 4096, 4096, 8),),
    ),
    Operator("add_rms_norm", _add_norm, dry=(1, 8, 64), exact=(2, 512, 2048), timed=((4, 4096, 2048),)),
    Operator(
        "swiglu",
        _swiglu,
        dry=(1, 8, 64),
        exact=(2, 512, 1408),
        timed=((4, 4096, 5504),),
        beyond=((1, (1 << 19) + 4096, 4096),),
    ),
    Operator(
        "linear_cross_entropy",
        _cross_entropy,
        dry=(8, 16, 100),
        exact=(512, 512, 8192),
        timed=((16384, 2048, 50280),),
    ),
    Operator("permute", _permute, dry=(12, 2, 3, 16), exact=(512, 4, 16, 512), timed=((16384, 8, 128, 2048),)),
    Operator("unpermute", _unpermute, dry=(12, 2, 3, 16), exact=(512, 4, 16, 512), timed=((16384, 8, 128, 2048),)),
    Operator(
        "grouped_linear",
        _grouped_linear,
        dry=(12, 3, 16, 16),
        exact=(1024, 8, 512, 256),
        timed=((131072, 128, 768, 2048), (4096, 128, 768, 2048)),
    ),
    Operator("adamw_8bit", _adamw_8bit, dry=(3, 40), exact=(512, 1000), timed=((4096, 4096),)),
    Operator("embedding", _embedding, dry=(24, 16, 16), exact=(4096, 1024, 512), timed=((16384, 50280, 2048),)),
]
