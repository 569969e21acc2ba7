"""The rules of the house (docs/design.md): layers, sizes, docstrings, cycles, and fields that something reads."""

import ast
import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fault_table
from headrace.model.registry import LAYER_KINDS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "parallel", "data", "pretrain", "launch")
MAY_IMPORT = {
    "kernels": set(),
    "model": {"kernels"},
    "parallel": {"kernels", "model"},
    "data": set(),
    "pretrain": {"kernels", "model", "parallel", "data"},
    "launch": {"kernels", "model", "parallel", "data", "pretrain"},
}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[str, ...]]:
    """Absolute dotted names (as tuples, `headrace` first for our own) that a source file imports."""
    package = ("headrace", *path.relative_to(ROOT).parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            found += [(*module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_arrows_run_downwards(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[folder] | {folder, "errors", "__version__"}
    for name in imports(path):
        assert name[0] not in FOLDERS, f"{name_of(path)} imports {name[0]} absolutely; use a relative import"
        if name[0] == "headrace":
            assert name[1] in allowed, f"{name_of(path)} may not import headrace.{name[1]}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("kernels", "model")], ids=name_of
)
def test_models_do_not_know_how_they_are_spread(path: Path) -> None:
    assert not any(name[:2] == ("torch", "distributed") for name in imports(path))


def test_no_import_cycles() -> None:
    modules = {("headrace", *p.relative_to(ROOT).with_suffix("").parts): p for p in SOURCES}
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for module, path in modules.items():
        graph[module] = {
            target for name in imports(path) for target in (name, name[:-1]) if target in modules and target != module
        }
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert module not in trail, " -> ".join(".".join(m) for m in (*trail, module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
            continue
        where = f"{name_of(path)}:{node.name}"
        assert (node.end_lineno or 0) - node.lineno < 60, f"{where} is longer than 60 lines"
        # An operator takes the tensors its definition has; what counts is what else the caller must remember.
        positional = [
            a
            for a in node.args.posonlyargs + node.args.args
            if a.arg not in ("self", "cls", "ctx")
            and not (name_of(path).startswith("kernels/") and "Tensor" in ast.unparse(a.annotation or a))
        ]
        assert len(positional) <= 8, f"{where} takes {len(positional)} positional parameters"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}:{node.name} has no docstring"
            for member in getattr(node, "body", []):
                if (
                    isinstance(node, ast.ClassDef)
                    and isinstance(member, ast.FunctionDef)
                    and not member.name.startswith("_")
                ):
                    assert ast.get_docstring(member), f"{name_of(path)}:{node.name}.{member.name} has no docstring"


def test_every_folder_is_packaged() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {"headrace"} | {
        ".".join(("headrace", *path.parent.relative_to(ROOT).parts)) for path in SOURCES if path.name == "__init__.py"
    }
    assert listed == there


def config_classes() -> list[type]:
    """The dataclass of every table of a run's configuration, found by walking the types."""
    from headrace.data.config import PrepareConfig
    from headrace.pretrain.config import Config

    found: list[type] = []

    def visit(cls: type) -> None:
        if cls in found:
            return
        found.append(cls)
        for hint in typing.get_type_hints(cls).values():
            if dataclasses.is_dataclass(hint):
                visit(typing.cast(type, hint))

    visit(Config)
    visit(PrepareConfig)
    return found


def test_every_config_field_is_read() -> None:
    """Beyond its declaration and its check, each field is read by name somewhere."""
    reads: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "problems":
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Attribute):
                        inner.attr = ""
            elif isinstance(node, ast.Attribute):
                reads.add(node.attr)
    reads |= set(LAYER_KINDS)  # read through getattr, by the words of the pattern
    unread = [f"{c.__name__}.{f.name}" for c in config_classes() for f in dataclasses.fields(c) if f.name not in reads]
    assert not unread


def test_importing_headrace_stays_light() -> None:
    heavy = ("transformers", "wandb", "deepspeed", "megatron", "matplotlib", "webdataset", "pyarrow")
    code = "import sys, headrace, headrace.pretrain.trainer, headrace.launch.cli; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert not set(heavy) & set(out.stdout.split())


def test_command_line_answers_without_torch() -> None:
    code = "import sys, headrace.launch.cli as cli; cli.build_parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd="/")


def test_nothing_names_a_machine() -> None:
    pattern = re.compile(r"(?<![\w/.])/(?:work|root|home|tmp/hr)/|https?://(?:pypi|files\.pythonhosted|registry)")
    for path in [*SOURCES, *TESTS, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile"]:
        if path != Path(__file__).resolve():
            assert not pattern.search(path.read_text()), name_of(path)


def test_every_fault_is_on_its_page(request: pytest.FixtureRequest) -> None:
    """Of the tests that this session has; `make faults` writes the page."""
    page = fault_table.PAGE.read_text()
    marks = (item.get_closest_marker("fault") for item in request.session.items)
    rows = {rf"\| {re.escape(mark.args[0])} \| [\d,]+ \| {re.escape(mark.args[1])} \|" for mark in marks if mark}
    assert [row for row in rows if not re.search(row, page)] == []
