"""All processes of a run must run the same: configuration, code, torch and Python, compared before anything else."""

import dataclasses
import hashlib
import platform
import tomllib

import torch
import torch.distributed as dist

from .. import __version__
from ..errors import UserError
from ..parallel.heartbeat import name_ranks
from ..parallel.mesh import World
from .config import Config
from .config_io import build
from .source import source_hash

CONFIGURATION = "configuration"
SHOWN = 8


def check_agreement(config: Config, world: World) -> None:
    """Compare what every process runs with what rank 0 runs. Collective over all processes, before all other work.

    Raises:
        UserError: on every process, naming the ranks that differ and in what.
    """
    text = config.to_toml()
    facts = {
        "host": platform.node(),
        CONFIGURATION: hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "headrace": f"{__version__} with source {source_hash()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    everyone: list[dict[str, str]] = [{} for _ in range(world.size)]
    dist.all_gather_object(everyone, facts)
    keys = [key for key in facts if key != "host" and any(other[key] != everyone[0][key] for other in everyone)]
    if not keys:
        return
    texts = [""] * world.size
    if CONFIGURATION in keys:
        dist.all_gather_object(texts, text)
    raise UserError("; ".join(_differences(keys, everyone, texts)), everywhere=True)


def check_same_data(fingerprint: str, config: Config, world: World) -> None:
    """Compare the data that every process opened with what rank 0 opened. Collective over all processes.

    Raises:
        UserError: on every process, naming the ranks that have other data.
    """
    everyone: list[tuple[str, str]] = [("", "")] * world.size
    dist.all_gather_object(everyone, (fingerprint, platform.node()))
    if others := {rank: host for rank, (found, host) in enumerate(everyone) if found != everyone[0][0]}:
        verb = "has" if len(others) == 1 else "have"
        raise UserError(
            f"{name_ranks(others)} {verb} other data in {config.data.folder} than rank 0 (by the fingerprint of its "
            "manifest); give all machines the same",
            everywhere=True,
        )


def _differences(keys: list[str], everyone: list[dict[str, str]], texts: list[str]) -> list[str]:
    """A clause for each thing that differs and each other form it takes, the configuration last with its remedy."""
    clauses = []
    for key in sorted(keys, key=CONFIGURATION.__eq__):
        mine = everyone[0][key]
        for theirs in dict.fromkeys(facts[key] for facts in everyone if facts[key] != mine):
            hosts = {rank: facts["host"] for rank, facts in enumerate(everyone) if facts[key] == theirs}
            run = f"{name_ranks(hosts)} {'runs' if len(hosts) == 1 else 'run'}"
            if key == CONFIGURATION:
                changed = _changed_keys(texts[0], texts[min(hosts)])
                clauses.append(
                    f"{run} another configuration: {changed}; start all ranks with the same files and overrides"
                )
            else:
                clauses.append(f"{run} other code ({key} {theirs} instead of {mine}); install the same on all machines")
    return clauses


def _changed_keys(mine: str, theirs: str) -> str:
    configs: list[Config] = []
    for text in (mine, theirs):
        config = build(Config, tomllib.loads(text), [])
        if config is None:  # written by other code than this
            return "keys that this version of headrace does not know"
        configs.append(config)
    tables = [field.name for field in dataclasses.fields(Config)]
    lines = configs[0].differences(configs[1], tables)
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "; ".join([*lines[:SHOWN], *more])
