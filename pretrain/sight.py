"""What a start opens to be seen by: its clock, its alerts, and a look at the disk and the age of checkpoints."""

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .alerts import AlertConfig, Alerts
from .checkpoint import latest_checkpoint
from .config import Config
from .goodput import read_starts, starts_in_vain
from .run_clock import STARTS, RunClock
from .run_folder import RunFolder


def open_sight(config: Config, folder: RunFolder | None, began_s: float) -> tuple[RunClock, Alerts]:
    """The clock and the alerts of a start; tells of a crash loop.

    Args:
        config: of the run.
        folder: on the first process; None on the others, which keep no record and send nothing.
        began_s: when this process began, in seconds since 1970.

    Raises:
        UserError: the alerts' webhook may not be used.
    """
    path = folder.path if folder else None
    clock = RunClock(path, began_s)
    facts = {"run": config.run.name, "id": clock.run_id, "start": clock.start}
    try:
        alerts = Alerts(config.alerts, facts, clock.tell, folder is not None)
    except BaseException:
        clock.close()
        raise
    if path is not None:
        earlier = read_starts(path / STARTS)[:-1]
        in_vain = starts_in_vain(earlier)
        if in_vain >= config.alerts.crash_loop:
            step = max((start.points[-1].step for start in earlier if start.points), default=0)
            alerts.send("crash_loop", step, f"{in_vain} starts in a row ended without a new step; see their logs")
    return clock, alerts


@dataclass
class Lookout:
    """Looks at the disk and at the newest checkpoint. Used on rank 0 only.

    Attributes:
        config: the limits.
        folder: the run folder.
        checkpoint_bytes: of one checkpoint's tensors.
        since_s: when this start began to train, seconds since 1970: checkpoints from before do not age.
    """

    config: AlertConfig
    folder: Path
    checkpoint_bytes: int
    since_s: float = field(default_factory=time.time)

    def look(self, alerts: Alerts, step: int) -> None:
        """Send `low_disk` and `old_checkpoint` where it is time; a disk that cannot be asked is asked again later."""
        with suppress(OSError):
            self._look(alerts, step)

    def _look(self, alerts: Alerts, step: int) -> None:
        free, needed = shutil.disk_usage(self.folder).free, self.config.low_disk_saves * self.checkpoint_bytes
        if free < needed:
            text = f"{free:,} bytes are free for {self.folder}, and {self.config.low_disk_saves} checkpoints need "
            alerts.send("low_disk", step, f"{text}{needed:,}; make room, or lower checkpoint.keep_last")
        if not self.config.checkpoint_age_s:
            return
        newest = latest_checkpoint(self.folder / "checkpoints")
        saved_s = self.since_s if newest is None else max(self.since_s, newest.stat().st_mtime)
        age_s = time.time() - saved_s
        if age_s > self.config.checkpoint_age_s:
            name = "no checkpoint" if newest is None else newest.name
            text = f"{age_s:,.0f} s of training are held by {name}; touch CHECKPOINT_NOW in {self.folder} to save"
            alerts.send("old_checkpoint", step, text)
