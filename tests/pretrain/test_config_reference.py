"""The page of keys says what the classes say, and leaves none out; `HEADRACE_WRITE_DOCS=1` writes it."""

import os
from pathlib import Path

import pytest

from headrace.data import PrepareConfig
from headrace.launch.cli import main
from headrace.pretrain.config import Config
from headrace.pretrain.config_reference import format_markdown, read_tables

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Configuration keys

A run is described by a TOML file (`configs/`), and any key may be set on the command line as `table.key=value`; a
mistake is named with the nearest key that there is. `headrace keys TABLE` shows a part of this page:

```
headrace keys train model.mamba2
headrace keys prepare
```

"""
PREPARE = "\n## Keys of `headrace prepare`\n\nThey are given on the command line, `key=value`.\n\n"


def page() -> str:
    run, prepare = (format_markdown(list(read_tables(cls))) for cls in (Config, PrepareConfig))
    return f"{HEAD}## Keys of a run\n\n{run}{PREPARE}{prepare}"


def test_every_key_has_a_meaning() -> None:
    tables = [*read_tables(Config), *read_tables(PrepareConfig)]
    assert [f"{table.name}.{key.name}" for table in tables for key in table.keys if not key.meaning] == []
    assert sum(len(table.keys) for table in tables) > 150


def test_the_page_is_up_to_date() -> None:
    if os.environ.get("HEADRACE_WRITE_DOCS") == "1":
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "HEADRACE_WRITE_DOCS=1 pytest tests/pretrain/test_config_reference.py"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "optimizer"]) == 0
    shown = capsys.readouterr().out
    assert "[optimizer.muon]" in shown
    assert '  kind = "adamw"' in shown
    assert "[train]" not in shown
    assert main(["keys", "prepare"]) == 0
    assert "heldout_fraction" in capsys.readouterr().out
    assert main(["keys", "optimiser"]) == 2
    assert "there is no table optimiser; there are run, model" in capsys.readouterr().err
