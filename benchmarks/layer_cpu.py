"""Training speed of one Mamba-2 layer on one CPU thread, beside the stock transformers layer of the same shape.

    python benchmarks/layer_cpu.py [--length 1024] [--rounds 7]

Both layers are norm + mixer + residual in float32 with the same weights; a round times one forward and backward of
each in turn, in CPU seconds of the process, and the table shows medians over the rounds. Every layer runs twice a
round: with the matrix products torch picks by itself (MKL's on x86), and with those that headrace's runs ask for
(oneDNN's, where `kernels.products.prefer_onednn` finds them exact). The last two columns say how many times faster
headrace is: with the same products, and as it runs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from transformers import Mamba2Config as StockConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block

from headrace.kernels.products import prefer_onednn
from headrace.model import SequenceContext
from headrace.model.block import Block
from headrace.model.mixers.mamba2 import Mamba2Config
from headrace.model.rules import collect_rules

D_MODEL, HEAD_DIM, D_STATE = 768, 64, 128


def build_ours() -> Block:
    """Our layer of the 130M model, with first values."""
    block = Block(Mamba2Config(head_dim=HEAD_DIM, d_state=D_STATE).build(D_MODEL, 1e-5, 0), D_MODEL, 1e-5)
    generator = torch.Generator().manual_seed(0)
    for name, rule in collect_rules(block).items():
        parameter = block.get_parameter(name)
        parameter.data.copy_(rule.init.draw(parameter.shape, generator, 24))
    return block


def build_stock(ours: Block, chunk_size: int) -> Mamba2Block:
    """The stock layer with our layer's weights."""
    config = StockConfig(
        hidden_size=D_MODEL,
        num_heads=2 * D_MODEL // HEAD_DIM,
        head_dim=HEAD_DIM,
        state_size=D_STATE,
        n_groups=1,
        num_hidden_layers=1,
        chunk_size=chunk_size,
    )
    stock, mixer = Mamba2Block(config, 0), ours.mixer
    parts = ("x", "B", "C")
    state = {
        "norm.weight": ours.norm.weight,
        "mixer.in_proj.weight": torch.cat([mixer.get_parameter(f"in_{p}.weight") for p in ("z", *parts, "dt")]),
        "mixer.conv1d.weight": torch.cat([mixer.get_parameter(f"conv_{p}.weight") for p in parts])[:, None],
        "mixer.conv1d.bias": torch.cat([mixer.get_parameter(f"conv_{p}.bias") for p in parts]),
        "mixer.norm.weight": mixer.get_parameter("norm.weight"),
        "mixer.out_proj.weight": mixer.get_parameter("out_proj.weight"),
        **{f"mixer.{p}": mixer.get_parameter(f"ssm.{p}") for p in ("A_log", "D", "dt_bias")},
    }
    stock.load_state_dict(state)
    return stock.train()


def time_step(layer: nn.Module, run: Callable[[Tensor], Tensor], x_BLD: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    x_BLD = x_BLD.clone().requires_grad_()
    layer.zero_grad()
    start = time.process_time()
    run(x_BLD).sum().backward()
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="one Mamba-2 layer, ours and stock, tokens per CPU-second")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_BLD = torch.randn(1, options.length, D_MODEL)
    ours = build_ours()
    # The stock layer adds its own update; ours leaves that to the next layer's norm.
    run_ours = lambda x_BLD: torch.add(*ours(x_BLD, SequenceContext()))
    layers: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {"headrace": (ours, run_ours)}
    for chunk_size in (256, 64):
        stock = build_stock(ours, chunk_size)
        layers[f"transformers, chunk {chunk_size}"] = (stock, stock)
        torch.testing.assert_close(stock(x_BLD), run_ours(x_BLD), rtol=1e-3, atol=1e-4)
    switches = {"torch's default": torch.backends.mkldnn.matmul.fp32_precision}
    prefer_onednn()
    switches["oneDNN"] = torch.backends.mkldnn.matmul.fp32_precision
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds + 1):
        for products, switch in switches.items():
            torch.backends.mkldnn.matmul.fp32_precision = switch
            for name, (layer, run) in layers.items():
                seconds.setdefault((name, products), []).append(time_step(layer, run, x_BLD))
    medians = {key: statistics.median(times[1:]) for key, times in seconds.items()}
    print(f"d_model {D_MODEL}, {options.length} tokens, forward + backward, float32, 1 thread\n")
    heading = (
        "layer",
        "products",
        "CPU-seconds",
        "tokens per CPU-second",
        "headrace, same products",
        "headrace, in a run",
    )
    print(f"| {' | '.join(heading)} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, products), median in medians.items():
        ratios = [median / medians["headrace", other] for other in (products, "oneDNN")]
        cells = (name, products, f"{median:.3f}", f"{options.length / median:.0f}", *(f"{r:.2f}x" for r in ratios))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
