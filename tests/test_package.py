"""The package as it is installed: a wheel holds every module, no test, and the command."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    # A copy, so that a build leaves nothing behind in the tree.
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir"]
    offline = ["--no-index", "--disable-pip-version-check"]
    subprocess.run([*wheel, str(tmp_path / "wheels"), str(tmp_path / "source"), *offline], check=True)
    (built,) = (tmp_path / "wheels").glob("headrace-*.whl")
    with zipfile.ZipFile(built) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
        entry_points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    folders = ("kernels/", "model/", "parallel/", "data/", "pretrain/", "launch/")
    sources = {name for name in files if name.endswith(".py") and (name.startswith(folders) or "/" not in name)}
    assert modules == {f"headrace/{name}" for name in sources}
    assert "headrace = headrace" in entry_points
