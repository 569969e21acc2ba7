"""TensorBoard, where `log.tensorboard` is on: the scalars of every record, in `tensorboard/` of the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError


class TensorBoard:
    """A writer of scalars.

    Args:
        folder: the run folder.
        step: where the run goes on; what an earlier start wrote of later steps is taken off the page.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                'log.tensorboard is on but tensorboard is not installed; pip install "headrace[tensorboard]"'
            ) from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, scalars: Mapping[str, Any], step: int) -> None:
        """Write those of the values that are numbers, to the disk at once: the process may be killed."""
        for key, value in scalars.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
