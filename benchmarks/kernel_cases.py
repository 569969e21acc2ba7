"""Calls of every Triton kernel, forward and backward, on tensors of any device: what is compiled, counted and timed.

On the meta device nothing runs: `headrace.kernels.launch.record_launches` then tells what would be launched.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class KernelCase:
    """A call of one operator's kernels on tensors of a device and dtype; `short` where a quick check takes it too."""

    name: str
    run: Callable[[str, torch.dtype], None]
    short: bool = True


def _swiglu(device: str, dtype: torch.dtype) -> None:
    from headrace.kernels.activations.fused import swiglu_backward, swiglu_forward

    gate, up, dout = (random(device, dtype, 8192, 5504) for _ in range(3))
    swiglu_forward(gate, up)
    swiglu_backward(dout, gate, up)


def _adamw_8bit(rows: int, columns: int) -> Callable[[str, torch.dtype], None]:
    """A parameter of whole blocks, and the part of one that begins and ends inside blocks."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.adamw_8bit import BlockGrid, Moments, Rounding, Update
        from headrace.kernels.adamw_8bit.fused import fused_maxima, fused_update

        p, grad = random(device, dtype, rows, columns), random(device, torch.float32, rows, columns)
        step, skip = torch.ones((), device=device), torch.zeros((), device=device)
        update = Update(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=step, skip=skip)
        rounding = Rounding(7, torch.arange(rows, device=device)) if dtype == torch.bfloat16 else None
        for grid in (BlockGrid.whole(columns, 256), BlockGrid(2 * columns + 100, 256, columns + 100, columns, 0)):
            codes = [torch.zeros(rows, columns, dtype=torch.uint8, device=device) for _ in range(2)]
            scales = [torch.zeros(rows, grid.num_blocks, device=device) for _ in range(2)]
            moments = Moments(codes[0], scales[0], codes[1], scales[1])
            maxima = None
            if grid.offset:
                maxima = torch.zeros(2, rows, grid.num_blocks, device=device)
                fused_maxima(grad, moments, update, grid, maxima)
            fused_update(p, grad, moments, update, grid, maxima, rounding)

    return run


def _ssd(*sizes: int, D_of: str = "head", plain: bool = False) -> Callable[[str, torch.dtype], None]:
    """The SSD recurrence of sizes B, L, H, P, G, N with everything: resets, D, states and their gradients.

    `plain` is without all of these; otherwise D is one number a "head" or a "channel".
    """
    B, L, H, P, G, N = sizes

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.ssd.fused import path

        x, dy = (random(device, dtype, B, L, H, P) for _ in range(2))
        keys, queries = (random(device, dtype, B, L, G, N) for _ in range(2))
        dt, A = random(device, dtype, B, L, H).abs(), -random(device, torch.float32, H).abs()
        D = reset = initial = dfinal = None
        if not plain:
            D = random(device, torch.float32, *{"head": (H,), "channel": (H, P)}[D_of])
            reset = torch.zeros(B, L, dtype=torch.bool, device=device)
            initial, dfinal = (random(device, torch.float32, B, H, P, N) for _ in range(2))
        inputs = path.FusedInputs(x, dt, A, keys, queries, D, reset)
        shared = path.prepare(inputs)
        _, _, states = path.ssd_fused_forward(inputs, initial, shared, keep=True)
        path.ssd_fused_backward(dy, dfinal, inputs, initial, states, shared)
        path.ssd_fused_summary(inputs, shared)

    return run


def _cross_entropy(T: int, D: int, V: int) -> Callable[[str, torch.dtype], None]:
    """A head of V rows: with gradients, without, and as the middle one of three shares."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.losses.chunked import linear_cross_entropy_forward
        from headrace.kernels.losses.fused import scale
        from headrace.kernels.losses.operator import tokens_at_a_time
        from headrace.kernels.losses.rows import HeadShard

        x, weight = random(device, dtype, T, D), random(device, dtype, V, D)
        target = torch.randint(V, (T,), device=device)
        options = (-100, tokens_at_a_time(x, V), 1e-4)
        loss, _, dx, _ = linear_cross_entropy_forward(x, weight, target, *options, True, True, fused=True)
        scale(dx, loss)
        linear_cross_entropy_forward(x, weight, target, *options, False, False, fused=True)
        shard = HeadShard(V, 3 * V, combine=lambda sums: sums)
        linear_cross_entropy_forward(x, weight, target, *options, True, True, shard=shard, fused=True)

    return run


def _norm(B: int, L: int, D: int, groups: int = 1, *, gate: str = "none") -> Callable[[str, torch.dtype], None]:
    """A norm of the first D channels of a wider tensor, with the gate before it, after it, or none."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.norms.fused import norm_backward, norm_forward

        x, z = random(device, dtype, B, L, 3 * D)[..., : 2 * D].split(D, -1)
        gate_BLD = None if gate == "none" else z
        weight, dy = random(device, torch.float32, D), random(device, dtype, B, L, D)
        _, rstd = norm_forward(x, gate_BLD, weight, 1e-5, D // groups, gate == "after")
        norm_backward(dy, x, gate_BLD, weight, rstd, gate == "after")

    return run


def _add_norm(B: int, L: int, D: int) -> Callable[[str, torch.dtype], None]:
    """A layer's output added to a float32 residual stream and to one of its own dtype."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.norms.fused import add_norm_backward, add_norm_forward

        update, dnormed, weight = (random(device, dtype, *shape) for shape in ((B, L, D), (B, L, D), (D,)))
        for wide in (torch.float32, dtype):
            x, dsum = (random(device, wide, B, L, D) for _ in range(2))
            _, total, rstd = add_norm_forward(x, update, weight, 1e-5)
            add_norm_backward(dnormed, dsum, total, weight, rstd, (wide, dtype))

    return run


def _embedding(T: int, V: int, D: int) -> Callable[[str, torch.dtype], None]:
    """The gradient of a table for tokens that are all equally frequent."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.embedding.fused import embedding_backward

        embedding_backward(random(device, dtype, T, D), torch.randint(V, (T,), device=device), V)

    return run


def _conv1d(B: int, L: int, D: int, K: int, *, everything: bool = True) -> Callable[[str, torch.dtype], None]:
    """The convolution over D channels of a wider projection; `everything`: with bias, states and resets."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.conv1d.fused import conv1d_backward, conv1d_forward

        x = random(device, dtype, B, L, 2 * D)[..., D:]
        weight, dy = random(device, torch.float32, D, K), random(device, dtype, B, L, D)
        bias = initial = dfinal = reset = None
        if everything:
            bias, reset = random(device, torch.float32, D), torch.zeros(B, L, dtype=torch.bool, device=device)
            initial, dfinal = (random(device, dtype, B, K - 1, D) for _ in range(2))
        conv1d_forward(x, weight, bias, initial, reset, True)
        conv1d_backward(dy, dfinal, x, weight, bias, initial, reset, True)

    return run


def _selective_scan(B: int, L: int, width: int, N: int) -> Callable[[str, torch.dtype], None]:
    """The selective scan of views of wider tensors, with resets, D and an initial state, and without."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.selective_scan.fused import selective_scan_backward, selective_scan_forward
        from headrace.kernels.selective_scan.layout import Inputs

        x, dt = random(device, dtype, B, L, 2 * width).split(width, -1)
        _, keys, queries = random(device, dtype, B, L, 16 + 2 * N).split([16, N, N], -1)
        A, D = -random(device, torch.float32, width, N).abs(), random(device, torch.float32, width)
        reset = torch.zeros(B, L, dtype=torch.bool, device=device)
        initial, dfinal = (random(device, torch.float32, B, width, N) for _ in range(2))
        for optional in ((D, initial, reset), (None, None, None)):
            inputs = Inputs(x, dt.abs(), A, keys, queries, *optional)
            _, _, kept = selective_scan_forward(inputs, keep_states=True)
            selective_scan_backward(random(device, dtype, B, L, width), dfinal, inputs, kept)
            selective_scan_forward(inputs._replace(C_BLN=None, D_I=None), keep_states=False)

    return run


def _expert_order(T: int, copies: int, X: int) -> Callable[[str, torch.dtype], None]:
    """The order of tokens by expert."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.experts.fused import order_copies

        order_copies(torch.randint(X, (T, copies), device=device), X)

    return run


def _expert_rows(T: int, copies: int, D: int) -> Callable[[str, torch.dtype], None]:
    """Tokens to rows and back, a tenth of the rows nobody's."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.experts.fused import combine_rows, spread_rows, unpermute_backward

        S = T * copies * 10 // 9
        place = torch.randperm(S, device=device)[: T * copies].view(T, copies)
        x, dout, weight = (random(device, kind, T, n) for kind, n in ((dtype, D), (dtype, D), (torch.float32, copies)))
        rows = spread_rows(x, place, S)
        combine_rows(rows, None, place)
        combine_rows(rows, weight, place)
        unpermute_backward(dout, rows, weight, place)

    return run


def _grouped_linear(S: int, X: int, O: int, F: int) -> Callable[[str, torch.dtype], None]:  # noqa: E741
    """A map of every expert, each with as many rows, and its gradients."""

    def run(device: str, dtype: torch.dtype) -> None:
        from headrace.kernels.experts.fused import grouped_linear, grouped_weight_gradient

        x, dy, weight = random(device, dtype, S, F), random(device, dtype, S, O), random(device, dtype, X, O, F)
        ends = (torch.arange(1, X + 1, device=device) * (S // X)).int()
        grouped_linear(x, weight, ends, False)
        grouped_linear(dy, weight, ends, True)
        grouped_weight_gradient(dy, x, ends)

    return run


def random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(shape, device=device).to(dtype)


CASES = [
    KernelCase("swiglu 8192x5504", _swiglu),
    KernelCase("adamw_8bit 4096x2560", _adamw_8bit(4096, 2560)),
    KernelCase("selective_scan 8x2048x5120 N16", _selective_scan(8, 2048, 5120, 16)),
    KernelCase("selective_scan 1x32768x5120 N16", _selective_scan(1, 32768, 5120, 16)),
    KernelCase("selective_scan 8x2048x4096 N32", _selective_scan(8, 2048, 4096, 32)),
    KernelCase("selective_scan 8x2048x4096 N64", _selective_scan(8, 2048, 4096, 64)),
    KernelCase("selective_scan 8x2048x4096 N128", _selective_scan(8, 2048, 4096, 128)),
    KernelCase("selective_scan 8x2048x4096 N256", _selective_scan(8, 2048, 4096, 256)),
    KernelCase("ssd 8x2048x80x64 G1 N128", _ssd(8, 2048, 80, 64, 1, 128)),
    KernelCase("ssd 4x4096x128x64 G8 N64", _ssd(4, 4096, 128, 64, 8, 64), short=False),
    KernelCase("ssd 4x4096x128x64 G8 N64, plain", _ssd(4, 4096, 128, 64, 8, 64, plain=True), short=False),
    KernelCase("ssd 8x2048x16x16 G1 N16", _ssd(8, 2048, 16, 16, 1, 16), short=False),
    KernelCase("ssd 8x2048x80x64 G1 N128, plain", _ssd(8, 2048, 80, 64, 1, 128, plain=True), short=False),
    KernelCase("ssd 8x2048x40x128 G1 N128, D a channel", _ssd(8, 2048, 40, 128, 1, 128, D_of="channel"), short=False),
    KernelCase("ssd 1x32768x8x128 G2 N256, D a channel", _ssd(1, 32768, 8, 128, 2, 256, D_of="channel")),
    KernelCase("ssd 4x4096x16x64 G1 N256, plain", _ssd(4, 4096, 16, 64, 1, 256, plain=True), short=False),
    KernelCase("ssd 4x4096x16x256 G1 N64", _ssd(4, 4096, 16, 256, 1, 64), short=False),
    KernelCase("ssd 4x4096x16x256 G1 N256, D a channel", _ssd(4, 4096, 16, 256, 1, 256, D_of="channel"), short=False),
    KernelCase("ssd 4x4096x16x256 G1 N256", _ssd(4, 4096, 16, 256, 1, 256), short=False),
    KernelCase("linear_cross_entropy 8192x2048 V50280", _cross_entropy(8192, 2048, 50280)),
    KernelCase("linear_cross_entropy 8192x512 V1024", _cross_entropy(8192, 512, 1024)),
    KernelCase("rms_norm 4x4096x4096", _norm(4, 4096, 4096)),
    KernelCase("rms_norm 4x4096x2560", _norm(4, 4096, 2560)),
    KernelCase("rms_norm 4x4096x16384", _norm(4, 4096, 16384)),
    KernelCase("gated_rms_norm 4x4096x4096 G8", _norm(4, 4096, 4096, 8, gate="before")),
    KernelCase("gated_rms_norm 4x4096x8192 G8", _norm(4, 4096, 8192, 8, gate="after")),
    KernelCase("gated_rms_norm 4x4096x5120", _norm(4, 4096, 5120, gate="before")),
    KernelCase("gated_rms_norm 4x4096x4096", _norm(4, 4096, 4096, gate="before")),
    KernelCase("gated_rms_norm 4x4096x16384", _norm(4, 4096, 16384, gate="after")),
    KernelCase("embedding 16384 tokens, 128256x4096", _embedding(16384, 128256, 4096)),
    KernelCase("embedding 65536 tokens, 256x768", _embedding(65536, 256, 768)),
    KernelCase("expert_order 16384 tokens to 8 of 128", _expert_order(16384, 8, 128)),
    KernelCase("expert_rows 16384x2048, 8 copies", _expert_rows(16384, 8, 2048)),
    KernelCase("expert_rows 16384x4096, 2 copies", _expert_rows(16384, 2, 4096), short=False),
    KernelCase("grouped_linear 131072 rows, 128x768x2048", _grouped_linear(131072, 128, 768, 2048)),
    KernelCase("grouped_linear 4096 rows, 128x768x2048", _grouped_linear(4096, 128, 768, 2048)),
    KernelCase("grouped_linear 8192 rows, 8x1000x500", _grouped_linear(8192, 8, 1000, 500), short=False),
    KernelCase("add_rms_norm 4x4096x2048", _add_norm(4, 4096, 2048)),
    KernelCase("add_rms_norm 4x4096x8192", _add_norm(4, 4096, 8192)),
    KernelCase("causal_conv1d 4x4096x6144 K4", _conv1d(4, 4096, 6144, 4)),
    KernelCase("causal_conv1d 1x131072x4352 K4, plain", _conv1d(1, 131072, 4352, 4, everything=False)),
    KernelCase("causal_conv1d 4x4096x2048 K8", _conv1d(4, 4096, 2048, 8)),
]
