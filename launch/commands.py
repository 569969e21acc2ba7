"""What each command does; the heavy imports happen inside, so that `headrace --help` is instant."""

import argparse
import faulthandler
import os
import sys
from pathlib import Path


def prepare(options: argparse.Namespace) -> int:
    """`headrace prepare`: corpus to tokenizer and shards."""
    from ..data import PrepareConfig, prepare
    from ..errors import UserError
    from ..pretrain.config_io import apply_overrides, build

    tables = apply_overrides({}, options.overrides)
    tables |= {key: getattr(options, key) for key in ("corpus", "out") if getattr(options, key) is not None}
    errors: list[str] = []
    config = build(PrepareConfig, tables, errors)
    errors += config.problems() if config else []
    if errors or config is None:
        raise UserError("; ".join(errors))
    report = prepare(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(report.lines()))
    return 0


def keys(options: argparse.Namespace) -> int:
    """`headrace keys`: what may be configured."""
    from ..pretrain.config_reference import choose_tables, format_text, read_tables

    if options.tables == ["prepare"]:
        from ..data import PrepareConfig

        print(format_text(list(read_tables(PrepareConfig))))
        return 0
    from ..pretrain.config import Config

    print(format_text(choose_tables(list(read_tables(Config)), options.tables)))
    return 0


def train(options: argparse.Namespace) -> int:
    """`headrace train`: one process of a run, or with --nproc the start of several."""
    # Read when torch is loaded. It would write pages about a connection that breaks; `Watch` says in one line whose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..errors import UserError
    from ..pretrain.config import load_config
    from .slurm import adopt_slurm

    adopt_slurm()
    path = Path(options.config)
    if options.until is not None and options.until < 1:
        raise UserError(f"--until={options.until} must be at least 1")
    if options.nproc is not None and "RANK" not in os.environ:
        until = [] if options.until is None else ["--until", str(options.until)]
        return _train_here(options, until)
    if options.restarts and "RANK" not in os.environ:
        raise UserError("--restarts needs --nproc: a process cannot start itself again")

    from ..parallel.environment import read_group
    from ..parallel.mesh import start_world, stop_world
    from ..parallel.watch import start_watch
    from ..pretrain.trainer import train
    from .local import end_with_launcher

    end_with_launcher()
    faulthandler.enable()  # a crash in compiled code says where Python was, in every thread
    config = load_config(path, options.overrides, read_group()[1])
    timeout_s = config.parallel.timeout_s
    world = start_world(timeout_s)
    try:
        with start_watch(world, timeout_s, config.watch, config.run.folder / "logs") as watch:
            try:
                progress = train(config, world, options.until, watch)
            except RuntimeError as error:
                # By the time it is known who left, a launcher that saw it has ended this process.
                if (line := watch.blame(error)) is None:
                    raise
                watch.leave(line)
            if world.is_first:
                print(f"{config.run.folder}: step {progress.step}, {progress.tokens:,} tokens", file=sys.stderr)
    finally:
        stop_world()
    return 0


def _train_here(options: argparse.Namespace, until: list[str]) -> int:
    from ..pretrain.config import load_config
    from .local import check_nproc, run_again_and_again

    check_nproc(options.nproc, options.restarts)
    load_config(Path(options.config), options.overrides, options.nproc)
    arguments = ["train", options.config, *until, *options.overrides]
    return run_again_and_again(arguments, options.nproc, options.restarts)


def launch(options: argparse.Namespace) -> int:
    """`headrace launch`: a run as a slurm job, or with --nproc on this machine."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from ..errors import UserError
    from ..pretrain.config import load_config
    from .batch import BatchConfig, batch_script, submit, write_script

    further = tuple((name, value) for name, _, value in (entry.partition("=") for entry in options.sbatch))
    batch = BatchConfig(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        tasks_per_node=options.tasks_per_node,
        time=options.time,
        signal_ahead_s=options.signal_ahead,
        crash_limit=options.crash_limit,
        stall_minutes=options.stall_minutes,
        options=further,
    )
    if options.nproc is not None:
        if options.dry_run or batch != BatchConfig(crash_limit=options.crash_limit):
            raise UserError(
                "--nproc starts the run here, and slurm's options and --dry-run are for a job; leave one out"
            )
        options.restarts = options.crash_limit
        return _train_here(options, [])
    if problems := batch.problems():
        raise UserError("; ".join(problems))
    config = load_config(Path(options.config), options.overrides, batch.processes)
    command = [sys.executable, "-m", "headrace", "train", options.config, *options.overrides]
    text = batch_script(batch, config.run.folder, config.run.name, config.train.steps, command, Path.cwd())
    if options.dry_run:
        print(text, end="")
        return 0
    path = write_script(text, config.run.folder)
    print(f"job {submit(path)}: {path}; headrace status {config.run.folder} shows how far it is")
    return 0


def preflight(options: argparse.Namespace) -> int:
    """`headrace preflight`: whether a run would start, fit and be safe here; the status is 1 if a check failed."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from .slurm import adopt_slurm

    adopt_slurm()
    if options.nproc is not None and "RANK" not in os.environ:
        from .local import check_nproc, run_processes

        check_nproc(options.nproc)
        full = ["--full"] if options.full else []
        return run_processes(["preflight", options.config, *full, *options.overrides], options.nproc).status
    from .local import end_with_launcher
    from .preflight import preflight

    end_with_launcher()
    return preflight(Path(options.config), options.overrides, options.full)


def explain(options: argparse.Namespace) -> int:
    """`headrace explain`: what one rank of a run holds and sends, without starting one."""
    from ..errors import UserError
    from ..pretrain.config import load_config
    from ..pretrain.explain import default_world, explain
    from .explain import format_explanation

    path = Path(options.config)
    world_size = options.world
    if world_size is None:
        world_size = default_world(load_config(path, options.overrides))
    if world_size < 1:
        raise UserError(f"--world={world_size} must be at least 1")
    print(format_explanation(explain(load_config(path, options.overrides, world_size), world_size, options.rank)))
    return 0


def status(options: argparse.Namespace) -> int:
    """`headrace status`: where runs stand."""
    from .status import find_runs, format_status, read_status

    print(format_status([read_status(folder) for folder in find_runs(options.run_folders)], options.json))
    return 0


def list_checkpoints(options: argparse.Namespace) -> int:
    """`headrace ls`: the checkpoints of a run."""
    from .status import list_checkpoints

    print(list_checkpoints(Path(options.run_folder)))
    return 0


def verify(options: argparse.Namespace) -> int:
    """`headrace verify`: every hash of checkpoints; status 1 where something is damaged."""
    from .verify import verify

    return int(not verify(Path(options.source), say=lambda line: print(line, flush=True)))


def compare(options: argparse.Namespace) -> int:
    """`headrace diff`: in what two runs differ; status 1 where they do, as of diff."""
    from .compare import differences

    found = differences(Path(options.first), Path(options.second))
    print("\n".join(found) or "the same configuration, code, packages and data")
    return int(bool(found))


def evaluate(options: argparse.Namespace) -> int:
    """`headrace eval`: bits per byte of the whole held-out split, kept in `results.json`."""
    from ..parallel.mesh import start_world, stop_world
    from ..pretrain.results import evaluate_run, format_results
    from .slurm import adopt_slurm

    adopt_slurm()
    world = start_world()
    try:
        results = evaluate_run(Path(options.run_folder), world, options.average)
    finally:
        stop_world()
    if world.is_first:
        print(format_results(results))
    return 0


def export(options: argparse.Namespace) -> int:
    """`headrace export`: a folder for stock Hugging Face classes."""
    from ..pretrain.hf import export_hf

    out = Path(options.out) if options.out else None
    print(export_hf(Path(options.run_folder), out, average=options.average))
    return 0


def generate(options: argparse.Namespace) -> int:
    """`headrace generate`: text from a checkpoint, as it is sampled."""
    from ..pretrain.generate import GenerateConfig, generate_text
    from ..pretrain.saved_run import load_run

    model, tokenizer, _ = load_run(Path(options.run_folder), average=options.average)
    config = GenerateConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for piece in generate_text(model, tokenizer, options.prompt, config):
        print(piece, end="", flush=True)
    print()
    return 0


def report(options: argparse.Namespace) -> int:
    """`headrace report`: the page that shows a run."""
    from ..pretrain.report import write_report

    print(write_report(Path(options.run_folder)))
    return 0
