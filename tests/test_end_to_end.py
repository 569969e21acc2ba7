"""The commands of `make train`, one after the other, on a corpus of a few pages; and the commands the pages show."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.launch.cli import parse
from tiny import CONFIG, write_corpus

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def headrace(folder: Path, *arguments: str) -> str:
    """Run one command in `folder`; what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.timeout(600)
def test_corpus_to_report(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "tiny.toml").write_text(CONFIG.replace("[data]", '[data]\nfolder = "data"'))
    prepare = ("prepare", "--corpus", "corpus", "--out", "data", "heldout_fraction=0.2", "tokenizer.vocab_size=320")
    assert "written" in headrace(tmp_path, *prepare)
    assert "already there" in headrace(tmp_path, *prepare)

    train = ("train", "tiny.toml", "--nproc", "2", "train.steps=30", "eval.every_steps=10", "eval.window=32")
    headrace(tmp_path, *train, "--until", "15")
    headrace(tmp_path, *train)
    run = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [r["bits_per_byte"] for r in records if r["kind"] == "eval"]
    assert len(scores) == 3
    assert scores[-1] < scores[0]

    table = headrace(tmp_path, "eval", "runs/tiny")
    assert re.search(r"gzip -9 +\d\.\d{4}", table)
    results = json.loads((run / "results.json").read_text())
    # The run's last evaluation read the same documents with the same weights, on two ranks.
    assert results["bits_per_byte"] == pytest.approx(scores[-1], rel=1e-5)

    headrace(tmp_path, "export", "runs/tiny")
    text = headrace(tmp_path, "generate", "runs/tiny", "--prompt", "the river", "--max-new-tokens", "20")
    assert text.startswith("the river")
    assert text == headrace(tmp_path, "generate", "runs/tiny", "--prompt", "the river", "--max-new-tokens", "20")
    headrace(tmp_path, "report", "runs/tiny")
    for name in ("config.toml", "manifest.json", "metrics.jsonl", "checkpoints", "hf/config.json", "report.html"):
        assert (run / name).exists(), name


def shown_commands() -> list[tuple[str, str]]:
    """Every `headrace ...` line in a code block of a page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                (page.name, line.partition("#")[0].strip())
                for line in lines
                if re.match(r"((torchrun|srun) .*)?headrace ", line)
            ]
    return found


@pytest.mark.parametrize(("page", "command"), shown_commands())
def test_shown_commands_are_understood(page: str, command: str) -> None:
    words = shlex.split(command)
    options = parse(words[words.index("headrace") + 1 :])
    if config := getattr(options, "config", None):
        counts = re.findall(r"--(?:nproc|nproc-per-node|ntasks-per-node|nodes|gpus-per-node) (\d+)", command)
        from headrace.pretrain.config import load_config

        world_size = math.prod(map(int, counts))
        load_config(ROOT / config, options.overrides, None if "explain" in words else world_size)


def test_shown_tests_and_files_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        shown = re.findall(r"`(?:\w+=\w+ )?pytest ([^\s`]+)[^`]*`", text) + re.findall(r"(benchmarks/\w+\.py)", text)
        linked = [str(page.parent.relative_to(ROOT) / name) for name in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
        for name in [*shown, *linked]:
            assert (ROOT / name).exists(), f"{page.name} shows {name}"


def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", page.read_text(), re.MULTILINE)) <= {
            pair for target in targets for pair in ((target, ""), ("", target))
        }
