"""Does AdamW with 8-bit moments learn as AdamW does? The quickstart's model, the same hyperparameters, several seeds.

`python benchmarks/optimizers_learning.py` needs the corpus of `make train` (`headrace prepare`); runs that are there
are not run again. Prints held-out losses and how far apart they end, and draws docs/images/adamw_8bit.png. Rows are
shorter than the quickstart's, so that 2,000 steps take minutes.
"""

import argparse
from pathlib import Path

from learning import ROOT, Curve, side_by_side

BASE = (
    "data.seq_len=256",
    "optimizer.kind=adamw",
    "optimizer.lr=1e-3",
    "eval.window=256",
    "eval.max_tokens=40000",
    "log.every_steps=20",
    "checkpoint.keep_last=1",
)
BITS = {32: "32-bit moments", 8: "8-bit moments"}


def options_of(bits: int, seed: int, steps: int) -> list[str]:
    """The overrides of a run."""
    every = max(1, steps // 8)
    return [
        *BASE,
        f"run.name=adamw-{bits}bit-seed{seed}-{steps}",
        f"run.seed={seed}",
        f"data.seed={seed}",
        f"optimizer.state_bits={bits}",
        f"train.steps={steps}",
        f"eval.every_steps={every}",
        f"checkpoint.every_steps={every}",
    ]


def draw(curves: dict[int, list[Curve]], path: Path) -> None:
    """Above, the losses of all runs; below, by how much 8 bits are worse, for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    for (bits, label), style in zip(BITS.items(), ("-", "--"), strict=True):
        for seed, curve in enumerate(curves[bits]):
            name = label if seed == 0 else None
            above.plot(*zip(*curve, strict=True), style, color=f"C{seed}", label=name)
    for seed, (exact, eight) in enumerate(zip(curves[32], curves[8], strict=True)):
        worse = [100 * (b / a - 1) for (_, a), (_, b) in zip(exact, eight, strict=True)]
        below.plot([step for step, _ in exact], worse, color=f"C{seed}", label=f"seed {seed}")
    below.axhspan(-0.5, 0.5, color="black", alpha=0.1)
    above.set_ylabel("held-out loss, nats per token")
    below.set_ylabel("8 bits worse by, %")
    below.set_xlabel("step")
    above.legend()
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "adamw_8bit.png")
    options = parser.parse_args()
    seeds = range(options.seeds)
    runs = side_by_side({(bits, seed): options_of(bits, seed, options.steps) for seed in seeds for bits in BITS})
    curves = {bits: [runs[bits, seed] for seed in seeds] for bits in BITS}
    for seed in seeds:
        exact, eight = curves[32][seed][-1][1], curves[8][seed][-1][1]
        print(f"seed {seed}: 32 bits {exact:.4f}, 8 bits {eight:.4f}, {100 * (eight / exact - 1):+.2f} %")
    mean = {bits: sum(curve[-1][1] for curve in all_) / len(all_) for bits, all_ in curves.items()}
    print(f"mean: 32 bits {mean[32]:.4f}, 8 bits {mean[8]:.4f}, {100 * (mean[8] / mean[32] - 1):+.2f} %")
    draw(curves, options.out)


if __name__ == "__main__":
    main()
