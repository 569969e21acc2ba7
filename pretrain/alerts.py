"""Telling someone that a run needs them: a command or a webhook is given each alert as JSON, beside the training."""

import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any, Literal, get_args
from urllib.parse import urlsplit

from ..errors import UserError

Kind = Literal[
    "nan", "spike", "rewind", "stall", "slow_rank", "low_disk", "old_checkpoint", "crash_loop", "save_failed"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
# Alerts that wait to be delivered; more than that are dropped.
WAITING = 64


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """Who is told when a run needs someone, and of what.

    Attributes:
        command: a program and its arguments, run without a shell; it gets the alert as JSON on its standard input.
        webhook_env: the environment variable that holds a URL to POST the alert to: https, or http to this machine.
        timeout_s: after which a command is ended, and a webhook given up.
        repeat_s: alerts of one kind within this time of the last are counted and not sent.
        checkpoint_age_s: of training since the newest checkpoint, for `old_checkpoint`; 0: never.
        crash_loop: starts in a row without a new step, for `crash_loop`, told by the next: below the launcher's limit.
        low_disk_saves: for `low_disk`, checkpoints for which there must be room.
    """

    command: tuple[str, ...] = ()
    webhook_env: str = ""
    timeout_s: float = 10.0
    repeat_s: float = 600.0
    checkpoint_age_s: float = 0.0
    crash_loop: int = 2
    low_disk_saves: int = 2

    def problems(self) -> list[str]:
        """Every field out of range."""
        found = [
            f"alerts.{name}={getattr(self, name)} must be at least {low}"
            for name, low in (("repeat_s", 0), ("checkpoint_age_s", 0), ("crash_loop", 1), ("low_disk_saves", 0))
            if getattr(self, name) < low
        ]
        if self.timeout_s <= 0:
            found.append(f"alerts.timeout_s={self.timeout_s} must be above 0")
        if self.webhook_env and not self.webhook_env.isidentifier():
            # Not repeated in the message: it may be the secret itself.
            found.append("alerts.webhook_env must be the name of an environment variable that holds the URL")
        return found


class Alerts:
    """Sends alerts from a thread of its own. Nothing here raises once it is built, and nothing waits but `flush`.

    Args:
        config: whom to tell.
        facts: of the run, part of every alert: its name, id and number of this start.
        record: keeps an alert beside the run's other records.
        is_first: whether this process tells; on others `send` does nothing.

    Raises:
        UserError: the webhook's variable is not set, or holds no URL that may be used.
    """

    def __init__(
        self, config: AlertConfig, facts: dict[str, Any], record: Callable[[str, dict[str, Any]], None], is_first: bool
    ) -> None:
        self._config, self._facts, self._record, self._is_first = config, facts, record, is_first
        self._url = webhook_url(config.webhook_env) if is_first and config.webhook_env else ""
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._kept_back: dict[str, int] = {}
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None

    def send(self, kind: Kind, step: int, text: str) -> None:
        """Tell of something; returns at once, and may be called from any thread.

        Args:
            kind: one of `KINDS`; of each, one in `alerts.repeat_s` seconds is sent.
            step: the last finished.
            text: one line: what, where, what to do.
        """
        if not self._is_first:
            return
        with self._lock:
            now = time.monotonic()
            if kind in self._last and now - self._last[kind] < self._config.repeat_s:
                self._kept_back[kind] = self._kept_back.get(kind, 0) + 1
                return
            self._last[kind] = now
            kept_back = self._kept_back.pop(kind, 0)
        alert = {"alert": kind, "step": step, "text": text, "time": time.time(), "kept_back": kept_back}
        _say(f"alert {kind} at step {step}: {text}")
        self._record("alert", alert)
        if self._config.command or self._url:
            self._enqueue({**self._facts, **alert, "host": platform.node()})

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until all is delivered or given up, `timeout_s` seconds at most (default: what delivery may take)."""
        limit_s = 2 * self._config.timeout_s + 1 if timeout_s is None else timeout_s
        until = time.monotonic() + limit_s
        while self._queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)

    def _enqueue(self, alert: dict[str, Any]) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver_all, name="headrace_alerts", daemon=True)
                self._thread.start()
        try:
            self._queue.put_nowait(alert)
        except queue.Full:
            _say(f"alert {alert['alert']} was dropped: {WAITING} are waiting to be delivered")

    def _deliver_all(self) -> None:
        while True:
            alert = self._queue.get()
            for way, deliver in (("command", self._run_command), ("webhook", self._post)):
                try:
                    failure = deliver(json.dumps(alert).encode())
                except Exception as error:
                    failure = type(error).__name__
                if failure:
                    _say(f"alert {alert['alert']} was not delivered by the {way}: {failure}")
            self._queue.task_done()

    def _run_command(self, body: bytes) -> str:
        """Why the command failed; empty where it did not, or there is none."""
        if not self._config.command:
            return ""
        try:
            process = subprocess.Popen(
                self._config.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"{self._config.command[0]}: {getattr(error, 'strerror', None) or error}"
        try:
            _, words = process.communicate(body, self._config.timeout_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it took more than {self._config.timeout_s:g} s"
        if process.returncode == 0:
            return ""
        last = words.decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"it ended with status {process.returncode}", *last])

    def _post(self, body: bytes) -> str:
        """Why the webhook failed; empty where it did not, or there is none. The URL, a secret, is never part of it."""
        if not self._url:
            return ""
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"}, method="POST")
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(self._url).hostname in LOCAL_HOSTS:
            handlers.append(urllib.request.ProxyHandler({}))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self._config.timeout_s):
                return ""
        except urllib.error.HTTPError as error:
            return f"the server answered {error.code}"
        except urllib.error.URLError as error:
            return str(getattr(error.reason, "strerror", None) or type(error.reason).__name__)
        except TimeoutError:
            return f"no answer in {self._config.timeout_s:g} s"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A webhook that points elsewhere might point to plain http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def webhook_url(variable: str) -> str:
    """The URL in an environment variable.

    Raises:
        UserError: there is none, or it is neither https nor http to this machine. The URL is not shown.
    """
    url = os.environ.get(variable, "")
    if not url:
        raise UserError(f"alerts.webhook_env={variable}: that variable is not set; set it to the URL, or empty the key")
    try:
        parts = urlsplit(url)
        is_good = bool(parts.hostname) and (
            parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS)
        )
    except ValueError:
        is_good = False
    if not is_good or any(ord(letter) <= 32 for letter in url):
        raise UserError(f"alerts.webhook_env={variable}: it must hold an https URL, or http to {LOCAL_HOSTS[0]}")
    return url


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
