"""A corpus of a few pages, prepared, and a run on it that takes a second."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headrace.data import PrepareConfig, TokenizerConfig, prepare
from headrace.errors import UserError
from headrace.parallel.mesh import World
from headrace.pretrain.config import Config, load_config
from headrace.pretrain.trainer import train

WORDS = ("river", "gate", "channel", "wheel", "water", "mill", "stone", "grain", "flour", "weir", "lake", "and")

CONFIG = """
[run]
name = "tiny"
[data]
seq_len = 32
[model]
vocab_size = 320
d_model = 16
pattern = "mamba2 mlp attention mlp"
[model.mamba2]
head_dim = 8
d_state = 8
chunk_size = 16
[model.attention]
num_heads = 2
rope_fraction = 1.0
[train]
steps = 6
batch_rows = 4
[optimizer]
kind = "muon"
[schedule]
warmup_steps = 2
[checkpoint]
every_steps = 2
keep_last = 9
[log]
every_steps = 1
"""


def write_corpus(folder: Path, num_files: int = 40) -> Path:
    """Text files of random sentences, the same each time."""
    generator = random.Random(1)
    folder.mkdir(parents=True)
    for number in range(num_files):
        lines = [" ".join(generator.choices(WORDS, k=8)) + "." for _ in range(generator.randint(1, 30))]
        (folder / f"{number:03}.txt").write_text("\n".join(lines))
    return folder


def prepare_tiny(folder: Path) -> Path:
    """The corpus as token shards with a tokenizer of 320 pieces."""
    corpus = write_corpus(folder / "corpus")
    out = folder / "data"
    tokenizer = TokenizerConfig(vocab_size=320)
    prepare(PrepareConfig(corpus=str(corpus), out=str(out), heldout_fraction=0.2, tokenizer=tokenizer))
    return out


def this_world() -> World:
    """This process in the group it is in, on the CPU."""
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def train_tiny(config: Config, until: int | None = None) -> int:
    """The step at which a run ends."""
    return train(config, this_world(), until).step


def train_or_refusal(config: Config, until: int | None = None) -> int | str:
    """The same, or the line with which all ranks are refused."""
    try:
        return train_tiny(config, until)
    except UserError as error:
        return str(error) if error.everywhere else "every rank would print its own"


def records(config: Config, *kinds: str) -> list[dict[str, Any]]:
    """Of these kinds, in the order in which the run wrote them."""
    lines = map(json.loads, (config.run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in kinds]


def losses(config: Config) -> list[float]:
    """Of every step on record."""
    return [record["loss"] for record in records(config, "train")]


def tiny_file(folder: Path, data: Path, steps: int = 6, every_steps: int = 2) -> Path:
    """`tiny.toml` in `folder`, of a tiny run under it that is saved each `every_steps`."""
    path = folder / "tiny.toml"
    text = CONFIG.replace("[data]", f'root = "{folder}"\n[data]\nfolder = "{data}"')
    text = text.replace("steps = 6", f"steps = {steps}").replace("every_steps = 2", f"every_steps = {every_steps}")
    path.write_text(text)
    return path


def tiny_config(folder: Path, data: Path, *overrides: str) -> Config:
    """The configuration of a tiny run under `folder`."""
    path = folder / "tiny.toml"
    path.write_text(CONFIG)
    return load_config(path, [f"run.root={folder}", f"data.folder={data}", *overrides])
