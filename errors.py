"""The one exception that means: the user can put this right."""


class UserError(Exception):
    """Something the user gave does not fit; the message says what, where and what to do.

    The command line prints it as one line and exits with status 2, without a traceback.

    Args:
        message: what, where, remedy.
        everywhere: every process of the run raises the same, so that one of them may speak for all.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere
