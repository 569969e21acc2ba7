"""Alerts: delivered to a real command and a real server, limited in rate, and never in the way of the training."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch

from headrace.errors import UserError
from headrace.pretrain.alerts import KINDS, AlertConfig, Alerts, webhook_url
from headrace.pretrain.config import Config, load_config
from headrace.pretrain.engine import Engine
from headrace.pretrain.run_clock import STARTS, RunClock
from headrace.pretrain.trainer import train
from tiny import this_world, tiny_config

FACTS = {"run": "tiny", "id": "ab12", "start": 3}
# Appends what it is given to the file that its first argument names.
KEEP = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + chr(10))"


def keeper(path: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", KEEP, str(path))


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def build(config: AlertConfig, is_first: bool = True) -> Alerts:
    return Alerts(config, FACTS, lambda kind, facts: None, is_first)


@contextmanager
def server(answer: int = 200, location: str = "") -> Iterator[tuple[str, list[dict]]]:
    """A web server on this machine: its URL, and what it was sent."""
    got: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append({"type": self.headers["Content-Type"], "path": self.path, "body": json.loads(body)})
            self.send_response(answer)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/secret", got
        finally:
            httpd.shutdown()
            thread.join()


def test_a_command_and_a_webhook_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[str, dict]] = []
    with server() as (url, got):
        monkeypatch.setenv("RUN_WEBHOOK", url)
        config = AlertConfig(command=keeper(tmp_path / "kept"), webhook_env="RUN_WEBHOOK")
        alerts = Alerts(config, FACTS, lambda kind, facts: recorded.append((kind, facts)), True)
        alerts.send("spike", 7, 'the loss rose; "quoted" $HOME `id`')
        alerts.flush()
    (alert,) = kept(tmp_path / "kept")
    assert got == [{"type": "application/json", "path": "/secret", "body": alert}]
    expected = {"run": "tiny", "id": "ab12", "start": 3, "alert": "spike", "step": 7, "kept_back": 0}
    assert {key: alert[key] for key in expected} == expected
    assert alert["text"] == 'the loss rose; "quoted" $HOME `id`'
    assert abs(alert["time"] - time.time()) < 60
    assert [kind for kind, _ in recorded] == ["alert"]


def test_repeated_alerts_are_counted(tmp_path: Path) -> None:
    alerts = build(AlertConfig(command=keeper(tmp_path / "kept"), repeat_s=100.0))
    now = time.monotonic()
    with mock.patch("headrace.pretrain.alerts.time.monotonic", lambda: now):  # noqa: PT008
        for _ in range(3):
            alerts.send("spike", 1, "again")
        alerts.send("stall", 1, "another kind")
        now += 101
        alerts.send("spike", 2, "later")
    alerts.flush()
    assert [(a["alert"], a["step"], a["kept_back"]) for a in kept(tmp_path / "kept")] == [
        ("spike", 1, 0),
        ("stall", 1, 0),
        ("spike", 2, 2),
    ]


def test_other_ranks_send_nothing(tmp_path: Path) -> None:
    alerts = build(AlertConfig(command=keeper(tmp_path / "kept"), webhook_env="NOT_SET_THERE"), is_first=False)
    alerts.send("spike", 1, "not mine to tell")
    alerts.flush()
    assert kept(tmp_path / "kept") == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("/nowhere/at/all",), "/nowhere/at/all: No such file or directory"),
        ((sys.executable, "-c", "raise SystemExit('no\\nroute')"), "it ended with status 1: route"),
        ((sys.executable, "-c", "import time; time.sleep(99)"), "it took more than 0.5 s"),
    ],
)
def test_a_command_that_fails_is_one_line(
    command: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alerts = build(AlertConfig(command=command, timeout_s=0.5 if "sleep" in command[-1] else 20.0))
    alerts.send("spike", 1, "text")
    alerts.flush()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("alert spike at step 1: text")
    assert [line[9:] for line in lines[1:]] == [f"alert spike was not delivered by the command: {said}"]


def test_a_webhook_that_fails_is_one_line_without_its_url(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    with server() as (elsewhere, got):
        with server(500) as (broken, _), server(302, elsewhere) as (moved, _):
            for url in (broken, moved):
                monkeypatch.setenv("RUN_WEBHOOK", url)
                alerts = build(AlertConfig(webhook_env="RUN_WEBHOOK"))
                alerts.send("spike", 1, "text")
                alerts.flush()
                said.append(capsys.readouterr().err.splitlines()[1][9:])
        assert got == []
    alerts.send("stall", 1, "nobody listens any more")
    alerts.flush()
    said.append(capsys.readouterr().err.splitlines()[1][9:])
    words = ("the server answered 500", "the server answered 302", "Connection refused")
    assert said == [
        f"alert {kind} was not delivered by the webhook: {word}"
        for kind, word in zip(("spike", "spike", "stall"), words, strict=True)
    ]


def test_sending_waits_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command waits until it is let go; in the meantime a hundred alerts are taken, and those too many dropped."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = (sys.executable, "-c", "import sys; open(sys.argv[1]).read(); " + KEEP.replace("1]", "2]"), str(gate))
    alerts = build(AlertConfig(command=(*command, str(tmp_path / "kept")), repeat_s=0.0, timeout_s=60.0))
    alerts.send("spike", 1, "the first")
    writer = gate.open("w")  # the command is there
    for step in range(2, 102):
        alerts.send("spike", step, "more")
    assert kept(tmp_path / "kept") == []
    alerts._config = AlertConfig(command=keeper(tmp_path / "unused"), timeout_s=1e-3)
    writer.close()
    alerts.flush(60.0)
    assert [alert["step"] for alert in kept(tmp_path / "kept")] == [1]
    dropped = [line for line in capsys.readouterr().err.splitlines() if "was dropped: 64 are waiting" in line]
    assert len(dropped) == 36


@pytest.mark.parametrize(
    "url",
    ["", "http://example.org/x", "ftp://localhost/x", "https://", "https://a b", "file:///etc/passwd", "http://["],
)
def test_urls_that_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_WEBHOOK", url)
    with pytest.raises(UserError, match=re.escape("alerts.webhook_env=RUN_WEBHOOK")) as refused:
        webhook_url("RUN_WEBHOOK")
    assert not url or url not in str(refused.value)


@pytest.mark.parametrize("url", ["https://example.org/hook?x=1", "http://localhost:8080/", "http://[::1]:9/x"])
def test_urls_that_are_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_WEBHOOK", url)
    assert webhook_url("RUN_WEBHOOK") == url


def test_the_table_alerts(tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, 'alerts.command=["notify", "--now"]', "alerts.webhook_env=HOOK")
    assert config.alerts == AlertConfig(command=("notify", "--now"), webhook_env="HOOK")
    (tmp_path / "again.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "again.toml").alerts == config.alerts
    bad = ("alerts.webhook_env=https://secret", "alerts.timeout_s=0", "alerts.crash_loop=0", "alerts.repeat_s=-1")
    with pytest.raises(UserError) as refused:
        tiny_config(tmp_path, data, *bad)
    assert "4 mistakes" in str(refused.value)
    assert "secret" not in str(refused.value)


def spoil_second(config: Config) -> str:
    """A run whose second gradient is not finite; what it ends with."""
    clip, calls = Engine.clip_gradients, []

    def clip_gradients(self: Engine, max_norm: float) -> torch.Tensor:
        calls.append(1)
        norm = clip(self, max_norm)
        return norm * float("nan") if len(calls) == 2 else norm

    world = this_world()
    with mock.patch.object(Engine, "clip_gradients", clip_gradients):
        try:
            return str(train(config, world).step)
        except UserError as error:
            return str(error)


def test_a_run_tells_of_what_it_meets(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """A skipped update, a disk without room and a checkpoint that is not written; and the losses are those without."""
    limits = ("alerts.checkpoint_age_s=1e-6", "alerts.low_disk_saves=1000000000000000", "checkpoint.every_steps=0")
    plain = tiny_config(tmp_path, data, "run.name=plain")
    config = tiny_config(tmp_path, data, *limits, f"alerts.command={json.dumps(keeper(tmp_path / 'kept'))}")
    assert gloo(2, spoil_second, plain) == gloo(2, spoil_second, config) == ["6", "6"]
    sent = {alert["alert"]: alert for alert in kept(tmp_path / "kept")}
    assert sorted(sent) == ["low_disk", "nan", "old_checkpoint"]
    assert len(kept(tmp_path / "kept")) == 3
    assert sent["nan"]["step"] == 2
    assert sent["nan"]["text"].startswith("1 updates had a non-finite gradient")
    assert "make room" in sent["low_disk"]["text"]
    assert "no checkpoint" in sent["old_checkpoint"]["text"]
    record = [json.loads(line) for line in (config.run.folder / STARTS).read_text().splitlines()]
    assert sorted(entry["alert"] for entry in record if entry["kind"] == "alert") == sorted(sent)
    curves = [
        [json.loads(line)["loss"] for line in (c.run.folder / "metrics.jsonl").open() if '"train"' in line]
        for c in (plain, config)
    ]
    assert curves[0] == curves[1]


def test_a_crash_loop(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """Three starts that fail before their first step are followed by one that says so, and says it before it fails."""
    command = f"alerts.command={json.dumps(keeper(tmp_path / 'kept'))}"
    config = tiny_config(tmp_path, data, command, "train.compile=true", "alerts.crash_loop=3")
    for starts in range(1, 5):
        with mock.patch.dict(os.environ, {"CXX": "no-such-compiler"}):
            found = gloo(1, fail_to_start, config)
        assert "needs a compiler" in found[0]
        assert len(kept(tmp_path / "kept")) == (starts == 4)
    (alert,) = kept(tmp_path / "kept")
    assert (alert["alert"], alert["start"]) == ("crash_loop", 4)
    assert alert["text"].startswith("3 starts in a row ended without a new step")


def fail_to_start(config: Config) -> str:
    with mock.patch.dict(os.environ, {"CXX": "no-such-compiler"}):
        return spoil_second(config)


def test_all_kinds_can_be_sent(tmp_path: Path) -> None:
    clock = RunClock(tmp_path, time.time())
    alerts = Alerts(AlertConfig(), FACTS, clock.tell, True)
    for kind in KINDS:
        alerts.send(kind, 1, "text")
    clock.close()
    assert (tmp_path / STARTS).read_text().count('"kind": "alert"') == len(KINDS)
