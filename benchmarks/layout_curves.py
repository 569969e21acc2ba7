"""The quickstart model, 200 steps in float32 under six layouts: how far the loss curves are from one process's.

`python benchmarks/layout_curves.py` needs the corpus of `make train` (`headrace prepare`); runs that are there are not
run again. Prints a table and draws docs/images/layouts.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "dp_shard=2": (2, {"dp_shard": 2}),
    "tp=2": (2, {"tp": 2}),
    "cp=2": (2, {"cp": 2}),
    "cp=2 zigzag, ring": (2, {"cp": 2, "cp_layout": "zigzag", "cp_attention": "ring"}),
    "pp=2": (2, {"pp": 2}),
    "tp=2 cp=2": (4, {"tp": 2, "cp": 2, "cp_layout": "zigzag", "cp_exchange": "doubling"}),
}


def losses(name: str, steps: int) -> list[float]:
    """The losses of a layout's run, which is started if need be."""
    processes, degrees = LAYOUTS[name]
    run = "layout-" + "-".join(f"{key}{value}" for key, value in degrees.items() or {("one", "")})
    metrics = ROOT / "runs" / run / "metrics.jsonl"
    options = [f"parallel.{key}={value}" for key, value in degrees.items()]
    options += [f"run.name={run}", f"train.steps={steps}", "log.every_steps=1", "eval.every_steps=0"]
    options += ["checkpoint.every_steps=0", "checkpoint.keep_last=1", "train.micro_batch_rows=2"]
    command = [sys.executable, "-m", "headrace", "train", "configs/quickstart.toml", *options]
    subprocess.run([*command, "--nproc", str(processes)], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Losses above, differences to one process below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    alone = next(iter(curves.values()))
    steps = range(1, len(alone) + 1)
    for number, (name, curve) in enumerate(curves.items()):
        color, width = f"C{number}", 2 * (len(curves) - number)
        above.plot(steps, curve, label=name, color=color, linewidth=width, alpha=0.6)
        if curve is not alone:
            differences = [max(abs(a - b) / b, 1e-9) for a, b in zip(curve, alone, strict=True)]
            below.semilogy(steps, differences, color=color, linewidth=1)
    above.set_ylabel("loss, nats per token")
    above.legend()
    below.axhline(1e-4, color="black", linestyle=":", linewidth=1)
    below.set_ylabel("relative difference")
    below.set_xlabel("step")
    figure.suptitle("The quickstart model under seven layouts, float32")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "layouts.png")
    options = parser.parse_args()
    curves = {}
    print("| layout | processes | last loss | largest relative difference |\n| --- | ---: | ---: | ---: |")
    for name, (processes, _) in LAYOUTS.items():
        curves[name] = losses(name, options.steps)
        alone = curves["one process"]
        largest = max(abs(a - b) / b for a, b in zip(curves[name], alone, strict=True))
        print(f"| {name} | {processes} | {curves[name][-1]:.5f} | {largest:.1e} |", flush=True)
    draw(curves, options.out)


if __name__ == "__main__":
    main()
