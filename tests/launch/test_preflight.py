"""`headrace preflight`: each check says ok where all is well, and FAIL where it is not."""

import fcntl
import io
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from headrace.data import TokenDataset
from headrace.errors import UserError
from headrace.launch.findings import Finding, attempt, format_findings, join_findings
from headrace.launch.machine import check_code_date, check_memory, check_port, check_versions
from headrace.launch.network import check_clocks, check_network
from headrace.launch.preflight import Plan, Report, check_open_files, check_saves, look_together, make_plan, preflight
from headrace.launch.storage import (
    check_data,
    check_disk,
    check_memory_folder,
    check_run_folder,
    check_shared_folder,
    file_system,
    file_system_fault,
    verify_data,
)
from headrace.parallel import mesh
from headrace.parallel.config import ParallelConfig
from headrace.parallel.mesh import World
from headrace.pretrain.checkpoint import load_full
from headrace.pretrain.memory.folder import copies_name, open_run
from tiny import CONFIG, tiny_config, train_tiny

CPU = torch.device("cpu")


def headrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace", "preflight", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def write_config(folder: Path, data: Path) -> str:
    path = folder / "tiny.toml"
    path.write_text(CONFIG.replace("[data]", f'root = "{folder}/runs"\n[data]\nfolder = "{data}"'))
    return str(path)


def test_all_is_well_on_two_processes(tmp_path: Path, data: Path) -> None:
    copies = ("checkpoint.memory_every_steps=1", f"checkpoint.memory_folder={tmp_path}/memory")
    done = headrace(write_config(tmp_path, data), "--nproc", "2", "--full", "parallel.tp=2", *copies)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[6:].split("  ")[0]: line[:4].strip() for line in done.stdout.splitlines()}
    ok = ("versions", "date", "open files", "config", "checkpoints", "port", "clocks")
    ok += ("data", "hashes", "memory", "run folder", "disk")
    assert {name: lines[name] for name in ok} == dict.fromkeys(ok, "ok")
    assert lines["memory copies"] == ("ok" if file_system(tmp_path) == "tmpfs" else "warn")
    assert lines["device"] == ("ok" if torch.cuda.is_available() else "warn")
    assert "us, " in done.stdout.splitlines()[-1]
    assert "GB/s" in done.stdout.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.toml"]


def test_what_is_wrong_is_one_line_each_and_status_1(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(write_config(tmp_path, data))
    assert preflight(config, ["data.folder=nowhere", "checkpoint.keep_last=999999999999"], full=True) == 1
    printed = capsys.readouterr()
    failed = [line for line in printed.out.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == ["data", "disk"]
    assert "nowhere holds no prepared data" in failed[0]
    assert "hashes" not in printed.out
    assert printed.err == ""


def test_a_bad_configuration_and_a_port_in_use(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(write_config(tmp_path, data))
    assert preflight(config, ["parallel.tp=3", "train.steps=0"], full=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in lines if line.startswith("FAIL")] == ["FAIL  config"]
    assert any("train.steps=0" in line for line in lines)
    assert lines[-1].startswith("warn  not checked")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (environment | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        assert preflight(config, [], full=False) == 1
    assert "set another" in capsys.readouterr().out.splitlines()[-1]


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    assert check_port().status == "ok"
    monkeypatch.setenv("MASTER_PORT", "99999")
    assert check_port().status == "FAIL"


def test_findings_of_ranks_are_joined() -> None:
    hosts = ["a", "a", "b"]
    code = [Finding("versions", "ok", text, everywhere=True) for text in ("torch 1", "torch 1", "torch 2")]
    room = [Finding("memory", "ok", f"{rank} GB") for rank in range(3)]
    joined = join_findings(list(zip(code, room, strict=True)), hosts)
    assert joined == [
        Finding("versions", "FAIL", "not the same everywhere: torch 1 on ranks 0-1 (a); torch 2 on rank 2 (b)"),
        Finding("memory", "ok", "0 GB"),
    ]
    bad = [[room[0]], [Finding("memory", "FAIL", "too little")], [Finding("memory", "FAIL", "too little")]]
    assert join_findings(bad, hosts) == [Finding("memory", "FAIL", "too little (ranks 1 (a), 2 (b))")]
    same = [[Finding("data", "FAIL", "gone", everywhere=True)]] * 3
    assert join_findings(same, hosts) == [Finding("data", "FAIL", "gone")]
    assert format_findings(joined).splitlines()[1] == "ok    memory    0 GB"
    assert (
        attempt("x", lambda: Path("/nowhere/at/all").read_text()).text == "/nowhere/at/all: No such file or directory"
    )


def test_the_date_of_the_code() -> None:
    now = time.time()
    assert check_code_date().status == "ok"
    newest = next(t for t in range(0, 10**6, 3600) if check_code_date(now - t).status == "warn")
    assert check_code_date(now - newest - 86400).status == "FAIL"
    assert check_code_date(0.0).status == "FAIL"


def test_versions_that_are_too_old() -> None:
    assert check_versions().status == "ok"
    with mock.patch("headrace.launch.machine.LEAST_TORCH", "99.0"):
        assert "torch 99.0 or newer is needed" in check_versions().text


def test_memory() -> None:
    with mock.patch("headrace.launch.machine.available_memory", return_value=100 * 10**9):
        assert [check_memory(CPU, gigabytes * 10**9, 2).status for gigabytes in (10, 45, 51)] == ["ok", "warn", "FAIL"]


def test_data_that_was_changed(tmp_path: Path, data: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    config = tiny_config(tmp_path, copy)
    assert check_data(config).status == "ok"
    assert TokenDataset(copy).fingerprint in check_data(config).text
    shard = next((copy / "train").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert check_data(config).status == "ok"  # quick: sizes alone
    with pytest.raises(UserError, match="blake2b"):
        verify_data(config, 0, 1)
    assert verify_data(config, 1, 2).status == "ok"  # another's share
    shard.write_bytes(content[:-512])
    assert attempt("data", lambda: check_data(config)).status == "FAIL"


def test_run_folders(tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data)
    assert "is new" in check_run_folder(config).text
    folder = config.run.folder
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    assert check_run_folder(config).status == "ok"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is running" in check_run_folder(config).text
    other = replace(config, optimizer=replace(config.optimizer, lr=0.5))
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        check_run_folder(other)
    folder.chmod(0o777)
    assert check_run_folder(config).status == "FAIL"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".preflight")] == []


def test_a_file_system_that_does_not_lock(tmp_path: Path) -> None:
    with mock.patch("headrace.launch.storage.fcntl.flock"):
        assert "locked again" in file_system_fault(tmp_path)


def test_a_checkpoint_is_as_large_as_foretold(gloo: Callable, tmp_path: Path, data: Path) -> None:
    """By the figures of a run that is played through: weights, moments and averages, counters of four bytes aside."""
    path = tmp_path / "tiny.toml"
    config = tiny_config(tmp_path, data, "train.average_decay=0.9", "train.steps=2")
    path.write_text(config.to_toml())
    plan, _ = make_plan(path, [], 0, 2)
    assert plan is not None
    gloo(1, train_tiny, config)
    tensors = load_full(config.run.folder / "checkpoints" / "step-00000002")
    assert plan.checkpoint_bytes == sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim)


def test_disk(tmp_path: Path, data: Path) -> None:
    config = tiny_config(tmp_path, data, "checkpoint.keep_last=2")
    usage = mock.Mock(return_value=mock.Mock(free=1000))
    with mock.patch("headrace.launch.storage.shutil.disk_usage", usage):
        assert [check_disk(config, size).status for size in (100, 200, 334)] == ["ok", "warn", "FAIL"]
        (config.run.folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        assert check_disk(config, 334).status == "warn"


def test_copies_in_memory(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "memory"
    config = tiny_config(tmp_path, data, "checkpoint.memory_every_steps=1", f"checkpoint.memory_folder={folder}")
    usage = mock.Mock(return_value=mock.Mock(free=1200))
    with mock.patch("headrace.launch.storage.shutil.disk_usage", usage):
        with mock.patch("headrace.launch.storage.file_system", return_value="tmpfs"):
            assert [check_memory_folder(config, size, 2).status for size in (100, 101)] == ["ok", "FAIL"]
            config.run.folder.mkdir()
            (config.run.folder / "run_id").write_text("0123456789ab\n")
            own = open_run(folder, copies_name("0123456789ab", config.run.folder))
            (own / "folders" / "need" / "no room").mkdir(parents=True)
            assert check_memory_folder(config, 101, 2).status == "FAIL"
            (own / "folders" / "copy").write_bytes(bytes(12))
            assert [check_memory_folder(config, size, 2).status for size in (101, 102)] == ["ok", "FAIL"]
            for run_id, status in ((b" \n", "ok"), (b"../open", "FAIL"), (b"\xff\xfe", "FAIL"), (b"a\0b", "FAIL")):
                (config.run.folder / "run_id").write_bytes(run_id)
                assert attempt("memory copies", lambda: check_memory_folder(config, 100, 2)).status == status
            (config.run.folder / "run_id").unlink()
            shutil.rmtree(folder)
        with mock.patch("headrace.launch.storage.file_system", return_value="nfs4"):
            assert "not in memory (nfs4)" in check_memory_folder(config, 100, 2).text
    assert not folder.exists()
    folder.mkdir(mode=0o755)
    assert "closed to all others" in attempt("memory copies", lambda: check_memory_folder(config, 1, 1)).text
    with mock.patch("headrace.launch.storage.os.access", return_value=False):
        folder.chmod(0o700)
        assert check_memory_folder(config, 1, 1).status == "FAIL"


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self")) == "proc"
    mounts = r"""a / ext4 rw 0 0
    b /data\040one nfs4 rw 0 0
    c /data\040one/in tmpfs rw 0 0"""
    with mock.patch.object(Path, "read_text", return_value=mounts):
        assert [file_system(Path(path)) for path in ("/x", "/data one/x", "/data one/in")] == ["ext4", "nfs4", "tmpfs"]
    with mock.patch.object(Path, "read_text", side_effect=FileNotFoundError):
        assert file_system(tmp_path) == "unknown"


def hash_apart(plan: Plan, wait_s: float) -> tuple[list[Finding], str]:
    """What a rank finds and says where rank 1 hashes for longer than a collective may take, and finds damage."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def verify(*_: object) -> Finding:
        if rank == 1:
            time.sleep(9.0)
            raise UserError("a shard was changed")
        return Finding("hashes", "ok", "whole")

    _set_pg_timeout(timedelta(seconds=6.0))
    report = Report(mine=[Finding("config", "ok", "valid")])
    with mock.patch.multiple("headrace.launch.preflight", verify_data=verify, HASH_S=wait_s):
        look_together(World(rank, size, CPU), report, plan, full=True)
    with redirect_stdout(io.StringIO()) as said:
        report.show(rank == 0)
    return [*report.joined, *report.mine], said.getvalue()


def test_hashing_that_takes_one_longer_is_waited_for(gloo: Callable, tmp_path: Path, data: Path) -> None:
    plan, _ = make_plan(Path(write_config(tmp_path, data)), [], 0, 2)
    (found, first), (same, second) = gloo(2, hash_apart, plan, 600.0)
    assert found == same
    assert [(finding.check, finding.text[:29]) for finding in found if finding.status == "FAIL"] == [
        ("hashes", "a shard was changed (rank 1 (")
    ]
    assert found[-1].check == "network dp_shard"
    assert len(first.splitlines()) == len(found)
    assert second == ""


def test_processes_that_lose_each_other_keep_what_they_found(gloo: Callable, tmp_path: Path, data: Path) -> None:
    plan, _ = make_plan(Path(write_config(tmp_path, data)), [], 0, 2)
    (found, first), (_, second) = gloo(2, hash_apart, plan, 4.0)
    status = {finding.check: finding.status for finding in found}
    known = ("config", "clocks", "data", "hashes")
    assert {name: status[name] for name in known} == dict.fromkeys(known, "ok")
    assert found[-1].check == "processes"
    assert found[-1].status == "FAIL"
    assert found[-1].text.startswith("rank 0 (")
    assert "could not go on with the others: " in found[-1].text
    assert len(first.splitlines()) == len(found)
    failed = [line.split()[1] for line in second.splitlines() if line.startswith("FAIL")]
    assert failed == ["hashes", "processes"]


def test_a_run_without_a_checkpoint_before_its_end(tmp_path: Path, data: Path) -> None:
    def found(*overrides: str) -> Finding:
        return check_saves(tiny_config(tmp_path, data, *overrides))

    assert found().text == "one every 2 of 6 steps"
    for overrides in (["checkpoint.every_steps=0"], ["checkpoint.every_steps=6"]):
        assert found(*overrides).status == "warn"
        assert "before the end: a crash starts the run over; set checkpoint.every_steps" in found(*overrides).text
    assert found("checkpoint.every_steps=0", "checkpoint.time_share=0.01").status == "ok"
    assert found("checkpoint.every_steps=0", "train.steps=1", "schedule.warmup_steps=0").status == "ok"
    assert "only copies in memory" in found("checkpoint.every_steps=0", "checkpoint.memory_every_steps=1").text


def test_open_files() -> None:
    with mock.patch("headrace.launch.preflight.resource.getrlimit", return_value=(256, 1024)):
        assert [check_open_files(size).status for size in (1, 192, 193)] == ["ok", "ok", "warn"]
        text = check_open_files(1000).text
        assert all(part in text for part in ("4,256", "1,024", "ulimit -n 4256"))
    with mock.patch("headrace.launch.preflight.resource.getrlimit", return_value=(256, resource.RLIM_INFINITY)):
        assert check_open_files(10**6).status == "ok"


@pytest.mark.parametrize("fails", [False, True])
def test_as_many_files_may_be_open_as_the_system_allows(fails: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with mock.patch("resource.setrlimit", side_effect=ValueError) if fails else nullcontext():
            mesh._allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256 if fails else before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def look(folder: Path) -> list[Finding]:
    """Checks between ranks, each of which claims a host of its own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hosts = [f"node{number}" for number in range(size)]
    found = check_clocks(hosts) + check_shared_folder(folder, hosts)
    return found + check_network(ParallelConfig(tp=2), World(rank, size, CPU))


def test_between_ranks(gloo: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.parent.mkdir()
    for found in gloo(4, look, folder):
        assert [(f.check, f.status) for f in found] == [
            (name, "ok") for name in ("clocks", "shared folder", "network dp_shard", "network tp")
        ]
    assert list(folder.parent.iterdir()) == []


def look_apart(folder: Path) -> list[Finding]:
    """The last rank's clock goes a minute and a half ahead, and what it sees of the folder's locks is nothing."""
    hosts = [f"node{number}" for number in range(dist.get_world_size())]
    is_last = dist.get_rank() == len(hosts) - 1
    with mock.patch("headrace.launch.storage.fcntl.flock") if is_last else nullcontext():
        return check_clocks(hosts, time.time() + 90.0 * is_last) + check_shared_folder(folder, hosts)


def test_a_clock_and_a_folder_that_are_not_the_others(gloo: Callable, tmp_path: Path) -> None:
    clocks, folder = gloo(3, look_apart, tmp_path / "a")[0]
    assert clocks.status == folder.status == "FAIL"
    assert clocks.text.startswith("those of rank 2 (node2) are ")
    assert "is not seen here (node2)" in folder.text
    assert list(tmp_path.iterdir()) == []
