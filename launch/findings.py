"""What `headrace preflight` finds: on one process, and put together over all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..parallel.heartbeat import name_ranks

Status = Literal["ok", "warn", "FAIL"]
_WORST: tuple[Status, ...] = ("ok", "warn", "FAIL")


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one process.

    Attributes:
        check: its name.
        status: `warn` where a run would start, but may not be what is wanted.
        text: the figures, or what is wrong and what to do.
        everywhere: whether all processes must find the same.
    """

    check: str
    status: Status
    text: str
    everywhere: bool = False


def attempt(check: str, action: Callable[[], Finding]) -> Finding:
    """What `action` finds; FAIL with the message of what it raises for the user or the system."""
    try:
        return action()
    except UserError as error:
        return Finding(check, "FAIL", str(error))
    except OSError as error:
        return Finding(check, "FAIL", f"{error.filename or 'a file'}: {error.strerror or error}")


def join_findings(by_rank: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """One list of the findings of all ranks, in the order of the lowest: a check is as bad as it is anywhere."""
    checks = dict.fromkeys(finding.check for findings in by_rank for finding in findings)
    joined: list[Finding] = []
    for check in checks:
        texts: dict[tuple[Status, str], dict[int, str]] = {}
        must_agree = False
        for rank, findings in enumerate(by_rank):
            for finding in findings:
                if finding.check == check:
                    texts.setdefault((finding.status, finding.text), {})[rank] = hosts[rank]
                    must_agree |= finding.everywhere
        joined += _join(check, texts, must_agree)
    return joined


def _join(check: str, texts: dict[tuple[Status, str], dict[int, str]], must_agree: bool) -> list[Finding]:
    worst = max((status for status, _ in texts), key=_WORST.index)
    same = {text: ranks for (status, text), ranks in texts.items() if status == worst}
    if must_agree and len(texts) > 1 and worst != "FAIL":
        words = "; ".join(f"{text} on {name_ranks(ranks)}" for (_, text), ranks in texts.items())
        return [Finding(check, "FAIL", f"not the same everywhere: {words}")]
    if len(texts) == 1 or worst == "ok":
        # Figures that may differ from rank to rank are shown as the first has them.
        return [Finding(check, worst, next(iter(same)))]
    return [Finding(check, worst, f"{text} ({name_ranks(ranks)})") for text, ranks in same.items()]


def format_findings(findings: Sequence[Finding]) -> str:
    """One line a check."""
    width = max(len(finding.check) for finding in findings)
    return "\n".join(f"{f.status:<4}  {f.check:<{width}}  {' '.join(f.text.split())}" for f in findings)
