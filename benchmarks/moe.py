"""Training cost of one mixture-of-experts layer, beside a loop over experts and stock transformers.

    python benchmarks/moe.py [--tokens 2048] [--rounds 7] [--device cpu]

All layers have the same weights and make the same choices (softmax over the chosen experts, SwiGLU). A round takes one
forward and backward of each in turn; the tables show medians, and the most memory that a pass takes beyond weights and
their gradients. On a CPU: float32, one thread, CPU seconds of the process. On a GPU: bfloat16, seconds between
synchronisations. The second table grows the experts at a constant number and size of those that a token goes to.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMoE

from headrace.kernels.products import prefer_onednn
from headrace.model import SequenceContext
from headrace.model.ffns.moe import MoE, MoEConfig
from headrace.model.rules import collect_rules

D_MODEL, HIDDEN, TOP_K = 512, 256, 4
Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]


def build_ours(num_experts: int, device: str, dtype: torch.dtype) -> MoE:
    """Our layer with first values."""
    options = {"num_experts": num_experts, "top_k": TOP_K, "d_hidden": HIDDEN, "renormalize": True}
    moe = MoE(MoEConfig(**options), D_MODEL, 0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for name, rule in collect_rules(moe).items():
        parameter = moe.get_parameter(name)
        parameter.data.copy_(rule.init.draw(parameter.shape, generator, 8))
    return moe.to(device, dtype)


def run_ours(moe: MoE, x_BLD: Tensor) -> Tensor:
    """Our layer, outside a model."""
    seq = SequenceContext()
    seq.enter(*x_BLD.shape[:2])
    return moe(x_BLD, seq)


def run_loop(moe: MoE, x_BLD: Tensor) -> Tensor:
    """The same with a loop over experts, each gathering its tokens and adding its outputs."""
    x_TD = x_BLD.flatten(0, 1)
    seq = SequenceContext()
    seq.enter(*x_BLD.shape[:2])
    experts_Tk, weights_Tk = moe.router(x_TD, seq)
    out_TD = torch.zeros_like(x_TD)
    experts = moe.experts
    assert experts.gate_proj is not None
    for number in range(experts.num_experts):
        token, choice = (experts_Tk == number).nonzero(as_tuple=True)
        x_SD = x_TD[token]
        hidden_SF = F.silu(x_SD @ experts.gate_proj[number].t()) * (x_SD @ experts.up_proj[number].t())
        y_SD = (hidden_SF @ experts.down_proj[number].t()) * weights_Tk[token, choice, None].to(x_SD.dtype)
        out_TD = out_TD.index_add(0, token, y_SD)
    return out_TD.view(x_BLD.shape)


def build_stock(ours: MoE, how: str) -> GraniteMoeHybridMoE:
    """The stock layer with our layer's weights, its experts computed as `how` says."""
    config = GraniteMoeHybridConfig(
        hidden_size=D_MODEL,
        intermediate_size=HIDDEN,
        num_local_experts=ours.config.num_experts,
        num_experts_per_tok=TOP_K,
        experts_implementation=how,
    )
    stock = GraniteMoeHybridMoE(config)
    experts = ours.experts
    assert experts.gate_proj is not None
    state = {
        "router.weight": ours.router.weight,
        "experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up_proj], 1),
        "experts.down_proj": experts.down_proj,
    }
    stock.load_state_dict(state)
    return stock.to(ours.router.weight.device, ours.router.weight.dtype).train()


def layers_for(ours: MoE, device: str) -> dict[str, Layer]:
    """All that are compared."""
    found: dict[str, Layer] = {
        "headrace": (ours, lambda x: run_ours(ours, x)),
        "a loop over experts": (ours, lambda x: run_loop(ours, x)),
    }
    for how in ("eager", "grouped_mm"):
        stock = build_stock(ours, how)
        found[f"transformers, {how}"] = (stock, stock)
    return found


def time_step(layer: Layer, x_BLD: Tensor, add_up: bool = False) -> float:
    """Seconds of one forward and backward: of the CPU's time, or on a GPU of ours; gradients are new, or added up."""
    module, run = layer
    x_BLD = x_BLD.clone().requires_grad_()
    on_gpu = x_BLD.device.type == "cuda"
    module.zero_grad(set_to_none=not add_up)
    if on_gpu:
        torch.cuda.synchronize()
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    run(x_BLD).square().sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def peak_memory(layer: Layer, x_BLD: Tensor) -> int:
    """Bytes that a pass takes at its peak beyond what was there before, gradients of weights being there."""
    time_step(layer, x_BLD, add_up=True)
    if x_BLD.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_step(layer, x_BLD, add_up=True)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        time_step(layer, x_BLD, add_up=True)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def medians(layers: dict[str, Layer], x_BLD: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turns; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds + 1):
        for name, layer in layers.items():
            seconds[name].append(time_step(layer, x_BLD))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.device == "cpu":
        prefer_onednn()
    x_BLD = torch.randn(1, options.tokens, D_MODEL, device=options.device, dtype=dtype)
    layers = layers_for(build_ours(options.experts, options.device, dtype), options.device)
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    expected = run_ours(layers["headrace"][0], x_BLD)  # type: ignore[arg-type]
    for name, (_, run) in layers.items():
        torch.testing.assert_close(run(x_BLD), expected, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    print(f"{options.tokens} tokens of width {D_MODEL}, experts of width {HIDDEN}, top {TOP_K}, {dtype}\n")
    print(f"| {options.experts} experts | seconds | tokens per second | x headrace | peak, MiB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    found = medians(layers, x_BLD, options.rounds)
    for name, median in found.items():
        cells = [f"{median:.4f}", f"{options.tokens / median:,.0f}", f"{median / found['headrace']:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {peak_memory(layers[name], x_BLD) / 2**20:.1f} |")
    del layers
    print("\n| experts | seconds | x 8 experts | peak, MiB |\n| ---: | ---: | ---: | ---: |")
    counts = (8, 16, 32, 64, 128)
    grown: dict[str, Layer] = {}
    for count in counts:
        ours = build_ours(count, options.device, dtype)
        grown[str(count)] = ours, lambda x, ours=ours: run_ours(ours, x)
    found = medians(grown, x_BLD, options.rounds)
    for name, median in found.items():
        peak = peak_memory(grown[name], x_BLD) / 2**20
        print(f"| {name} | {median:.4f} | {median / found['8']:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
