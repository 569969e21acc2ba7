"""Does a mixture of experts learn in fewer steps? MoE-Mamba against the dense Mamba model, equal active parameters.

`python benchmarks/moe_learning.py` needs the corpus of `make train` (`headrace prepare`); runs that are there are not
run again. Both models alternate a recurrence and a feed-forward layer; in one, each of the latter is a Switch layer of
eight such networks, one for each token. Same data, steps, optimizer and hyperparameters. Prints held-out losses
and the step at which the mixture is down to the dense model's last (linear in between), and draws docs/images/moe.png.
MoE-Mamba (arXiv:2401.04081) reports 2.2 to 2.35 times fewer steps at 25M to 100M active parameters.
"""

import argparse
from itertools import pairwise
from pathlib import Path

from learning import CONFIG, ROOT, Curve, held_out

from headrace.pretrain.config import load_config

BASE = (
    "data.seq_len=256",
    "model.d_model=128",
    "model.mamba1.d_state=16",
    "model.mlp.d_hidden=384",
    "model.moe.d_hidden=384",
    'model.mlp.activation="relu2"',
    'model.moe.activation="relu2"',
    "model.moe.num_experts=8",
    "model.moe.top_k=1",
    "train.batch_rows=16",
    "eval.window=256",
    "eval.max_tokens=60000",
    "log.every_steps=10",
    "checkpoint.keep_last=1",
)
PATTERNS = {"dense": "4*({mixer} mlp)", "moe": "4*({mixer} moe)"}


def options_of(name: str, mixer: str, steps: int) -> list[str]:
    """The overrides of a run."""
    pattern = PATTERNS[name].format(mixer=mixer)
    every = max(1, steps // 20)
    return [
        *BASE,
        f"run.name=learning-{mixer}-{name}-{steps}",
        f'model.pattern="{pattern}"',
        f"train.steps={steps}",
        f"eval.every_steps={every}",
        f"checkpoint.every_steps={every * 5}",
    ]


def step_at(curve: Curve, loss: float) -> float | None:
    """The first step at which a curve is down to `loss`, None if it never is."""
    for (before, above), (after, below) in pairwise(curve):
        if below <= loss:
            return before + (after - before) * max(0.0, above - loss) / (above - below)
    return None


def draw(curves: dict[str, Curve], mixer: str, path: Path) -> None:
    """Both curves, and where the dense one's last loss is met."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    labels = {"dense": f"dense: {mixer}, feed-forward", "moe": f"MoE: {mixer}, 8 experts, top 1"}
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=labels[name], marker=".")
    last = curves["dense"][-1][1]
    axes.axhline(last, color="black", linestyle=":", linewidth=1)
    if (met := step_at(curves["moe"], last)) is not None:
        axes.axvline(met, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_ylim(top=curves["dense"][1][1])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--mixer", choices=("mamba1", "mamba2"), default="mamba1")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "moe.png")
    options = parser.parse_args()
    runs = {name: options_of(name, options.mixer, options.steps) for name in PATTERNS}
    curves = {name: held_out(run) for name, run in runs.items()}
    for name, curve in curves.items():
        model = load_config(CONFIG, runs[name]).model
        print(f"{name}: {model.num_params():,} parameters, {model.num_active_params():,} active")
        print(f"{name}: {', '.join(f'{step}: {loss:.4f}' for step, loss in curve)}")
    last = curves["dense"][-1][1]
    met = step_at(curves["moe"], last)
    if met is None:
        print(f"the mixture does not reach the dense model's {last:.4f} in {options.steps} steps")
    else:
        print(f"the mixture reaches the dense model's {last:.4f} at step {met:.0f}: {options.steps / met:.2f} x fewer")
    draw(curves, options.mixer, options.out)


if __name__ == "__main__":
    main()
