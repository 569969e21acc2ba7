"""Nothing that the environment holds in confidence is left in a run folder, or shown."""

import gzip
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from headrace.launch.cli import main
from ranks import free_port, start_ranks
from tiny import tiny_config

CANARIES = {
    "HEADRACE_ALERTS": "canary0hook5d1f",
    "WANDB_API_KEY": "canary1wandb" + 28 * "7",
    "HF_TOKEN": "hf_canary2token9ab3",
    "AWS_SECRET_ACCESS_KEY": "canary3/aws+secret/41c8",
    "AWS_SESSION_TOKEN": "canary4session77e0",
    "HTTPS_PROXY": "http://user:canary5proxy@127.0.0.1:9",
    "GITHUB_TOKEN": "ghp_canary6b2d6",
    # All of 127.0.0.0/8 is this machine.
    "MASTER_ADDR": "127.83.41.7",
}

# Rank 1 crashes, and rank 0 tells of that and ends as well.
CRASHING = """
import os, sys
from headrace.launch.cli import main
from headrace.pretrain.engine import Engine
before, calls = Engine.forward_backward, []
def forward_backward(self, batch):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 4:
        assert os.environ["AWS_SECRET_ACCESS_KEY"].startswith("canary")
        raise RuntimeError("the device fell off")
    return before(self, batch)
Engine.forward_backward = forward_backward
sys.exit(main(sys.argv[1:]))
"""


def run(folder: Path, secrets: dict[str, str]) -> str:
    """What the two processes of a run printed, of which the second crashes in step 4."""
    (folder / "crashing.py").write_text(CRASHING)
    command = [sys.executable, str(folder / "crashing.py"), "train", str(folder / "run.toml")]
    with start_ranks(folder, command, **secrets) as ranks:
        assert ranks.statuses([0, 1], 200) == [1, 1], ranks.said(0)
    return ranks.said(0) + ranks.said(1)


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file by its name, unpacked where it is packed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            body = path.read_bytes()
            yield path.name, gzip.decompress(body) if path.suffix == ".gz" else body


def test_secrets_stay_in_the_environment(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = dict(CANARIES)
    secrets["HEADRACE_ALERTS"] = f"http://127.0.0.1:{free_port()}/{CANARIES['HEADRACE_ALERTS']}"
    optional = [
        f"log.{name}={value}" for name, value in (("tensorboard", "true"), ("wandb", "offline")) if find_spec(name)
    ]
    command = json.dumps([sys.executable, "-c", "raise SystemExit('no route')"])
    alerts = ("alerts.webhook_env=HEADRACE_ALERTS", f"alerts.command={command}", "alerts.checkpoint_age_s=1e-6")
    config = tiny_config(tmp_path, data, *optional, *alerts, "log.profile_steps=1")
    (tmp_path / "run.toml").write_text(config.to_toml())
    folder = config.run.folder
    folder.mkdir()
    (folder / "PROFILE").touch()
    said = run(tmp_path, secrets)
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    for look in (["status", str(folder)], ["ls", str(folder)], ["launch", str(tmp_path / "run.toml"), "--dry-run"]):
        assert main(look) == 0
    shown = capsys.readouterr()
    said += shown.out + shown.err
    for words in (
        "was not delivered by the webhook: Conn",
        "by the command: it ended with",
        "RuntimeError: the device",
    ):
        assert words in said
    files = list(contents(folder))
    names = {name for name, _ in files}
    assert {"config.toml", "manifest.json", "starts.jsonl", "metrics.jsonl", "rank-00001.safetensors"} <= names
    assert any(name.startswith("step-") and name.endswith(".json.gz") for name in names)
    assert any(b'"alert": "old_checkpoint"' in body for _, body in files)
    for name, canary in CANARIES.items():
        found = [file for file, body in [*files, ("what is printed", said.encode())] if canary.encode() in body]
        assert found == [], name
