"""docs/faults.md: what was done to runs, how often, and how it ended, from the tests marked `fault`.

`@pytest.mark.fault("what was done", "what must follow")`; a test that does it more than once says how often with
`record_property("tried", n)`. `make faults` runs them in their long form, with `HEADRACE_FAULTS=long`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONG = os.environ.get("HEADRACE_FAULTS") == "long"
PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
BEGIN, END = "<!-- table of faults -->\n", "<!-- end of table -->"


def times(short: int, long: int) -> int:
    """How often a fault is tried: in every run of the tests, and by `make faults`."""
    return long if LONG else short


def table(reports: Iterable[Any]) -> str:
    """A row for each fault of the tests' reports: how often it was tried, and what followed."""
    tried: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        said = dict(report.user_properties)
        if "fault" in said:
            row = tried.setdefault(said["fault"], [0, 0])
            row[0] += int(said.get("tried", 1))
            row[1] += report.failed
    lines = ["| what was done | times | what followed |", "| --- | ---: | --- |"]
    for (fault, outcome), (count, failed) in sorted(tried.items()):
        lines.append(f"| {fault} | {count:,} | {f'**{failed} tests failed**' if failed else outcome} |")
    return "\n".join(lines) + "\n" if tried else ""


def write(text: str) -> None:
    """Put the table into docs/faults.md."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + text + END + rest.partition(END)[2])
