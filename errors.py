"""The exceptions that are told in one line: the user, or who keeps the machines, can put this right."""

import errno

# What a file system says of names and rights that the user gave; all else is its own failing.
USERS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST} | {
    errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS, errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV
}  # fmt: skip


class UserError(Exception):
    """Something the user gave does not fit; the message says what, where and what to do.

    The command line prints it as one line and exits with status 2, without a traceback.

    Args:
        message: what, where, remedy.
        everywhere: every process of the run raises the same, so that one of them may speak for all.
    """

    status = 2

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class MachineError(UserError):
    """A disk or a machine failed, and nothing is wrong with what was asked: one line too, but exit status 1.

    Whoever starts runs again after a crash does so after this.
    """

    status = 1


def is_machines(error: Exception) -> bool:
    """Whether `error` is the fault of a machine or a disk, and not of what the user gave."""
    return isinstance(error, MachineError) or (isinstance(error, OSError) and error.errno not in USERS)


def file_error(message: str, error: OSError) -> UserError:
    """What to raise for `error`: a `MachineError` where the disk failed, else a `UserError`."""
    return (MachineError if is_machines(error) else UserError)(message)
