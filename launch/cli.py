"""The command `headrace`: what it takes, and how it ends."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from .. import __version__
from ..errors import MachineError, UserError, is_machines
from . import commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0; 1 for a defect of ours or a machine's; 2 for a mistake of the user's; 130 for Ctrl-C.
    """
    if not isinstance(sys.stderr, Lossy):
        sys.stderr = Lossy(sys.stderr)
    options = parse(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except UserError as error:
        if not error.everywhere or os.environ.get("RANK", "0") == "0":
            print(f"headrace: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        if "RANK" not in os.environ:  # the launcher speaks for its processes
            print("headrace: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left (as `| head` does); closing stdout again at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"headrace: error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return MachineError.status if is_machines(error) else UserError.status


class Lossy:
    """A text stream that may lose what it is given, and nothing else: its disk may be full, its reader gone.

    Training is not to end for a line that cannot be shown.

    Args:
        stream: where lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of a file; never raises for what the system says."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a file; never raises for what the system says."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command; `key=value` may stand before and after flags, which argparse alone would refuse."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets `run` to the function that carries it out."""
    parser = argparse.ArgumentParser(prog="headrace", description="Pretrain state-space and hybrid language models.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_training, _add_launch, _add_reading, _add_using):
        add(subparsers)
    return parser


def _add_training(subparsers) -> None:  # type: ignore[no-untyped-def]
    prepare = _command(subparsers, "prepare", commands.prepare, "turn a corpus into a tokenizer and token shards")
    prepare.add_argument("--corpus", help="a folder of text, or 'stdlib': Python's own library (default)")
    prepare.add_argument("--out", help="where the prepared data goes")
    _add_overrides(prepare, "tokenizer.vocab_size=8192")

    train = _command(subparsers, "train", commands.train, "train a model, going on from its newest checkpoint")
    train.add_argument("config", help="a TOML file")
    train.add_argument("--nproc", type=int, help="start this many processes here (default: as torchrun did, else 1)")
    train.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="K",
        help="with --nproc: start again after a crash or hang, up to K times without a new step (default: 0)",
    )
    train.add_argument("--until", type=int, metavar="STEP", help="save and stop after this step; start again to go on")
    _add_overrides(train)

    summary = "check that a run would start, fit and be safe here: one line a check, status 1 if one fails"
    preflight = _command(subparsers, "preflight", commands.preflight, summary)
    preflight.add_argument("config", help="a TOML file")
    preflight.add_argument("--nproc", type=int, help="check with this many processes here (default: as torchrun did)")
    preflight.add_argument("--full", action="store_true", help="hash the data too")
    _add_overrides(preflight)

    summary = "print what each process of a run will hold and send, without starting one"
    explain = _command(subparsers, "explain", commands.explain, summary)
    explain.add_argument("config", help="a TOML file")
    explain.add_argument("--world", type=int, metavar="N", help="processes (default: as few as the degrees ask for)")
    explain.add_argument("--rank", type=int, default=0, help="the process to show (default: 0)")
    _add_overrides(explain)


def _add_launch(subparsers) -> None:  # type: ignore[no-untyped-def]
    summary = "submit a run to slurm, or start it here: it goes on after time limits, crashes and hangs"
    launch = _command(subparsers, "launch", commands.launch, summary)
    add = launch.add_argument
    add("config", help="a TOML file")
    add("--nproc", type=int, help="no slurm: as `train --nproc N --restarts CRASH_LIMIT`")
    add("--nodes", type=int, default=1, help="of the job (default: 1)")
    add("--gpus-per-node", type=int, default=0, help="and as many processes (default: none, on CPUs)")
    add("--tasks-per-node", type=int, default=1, help="processes on each node without GPUs (default: 1)")
    add("--time", default="", help="limit of one job, as 4:00:00 (default: the partition's)")
    ahead = "with --time, save and stop this many seconds before the limit (default: 180)"
    add("--signal-ahead", type=int, default=180, metavar="S", help=ahead)
    limit = "give up after this many starts in a row without a new step (default: 3)"
    add("--crash-limit", type=int, default=3, metavar="K", help=limit)
    stall = "end a start that has recorded no new step for so long, as a crash (default: 60; 0: never)"
    add("--stall-minutes", type=int, default=60, metavar="M", help=stall)
    further = "a further option of sbatch, as partition=gpu; may be repeated"
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help=further)
    add("--dry-run", action="store_true", help="print the script instead")
    _add_overrides(launch)


def _add_reading(subparsers) -> None:  # type: ignore[no-untyped-def]
    keys = _command(subparsers, "keys", commands.keys, "show every key of a configuration: type, default, meaning")
    keys.add_argument("tables", metavar="table", nargs="*", help="as model.mamba2; prepare (default: all of a run)")

    status = _command(subparsers, "status", commands.status, "show where runs stand, without disturbing them")
    status.add_argument("run_folders", metavar="run", nargs="*", help="run folders (default: all in runs/)")
    status.add_argument("--json", action="store_true", help="one JSON object a line")

    listing = _command(subparsers, "ls", commands.list_checkpoints, "list the checkpoints of a run")
    listing.add_argument("run_folder", metavar="run", help="a run folder")

    verification = _command(
        subparsers, "verify", commands.verify, "check every byte of checkpoints; the status is 1 if any is damaged"
    )
    verification.add_argument("source", metavar="run", help="a run folder, or one of its checkpoints")

    difference = _command(
        subparsers, "diff", commands.compare, "show in what two runs differ; the status is 1 if they do"
    )
    difference.add_argument("first", help="a run folder")
    difference.add_argument("second", help="another")


def _add_using(subparsers) -> None:  # type: ignore[no-untyped-def]
    evaluate = _command(subparsers, "eval", commands.evaluate, "held-out bits per byte of a run, beside gzip and xz")
    _add_run(evaluate)

    export = _command(subparsers, "export", commands.export, "write a checkpoint as a folder Hugging Face classes load")
    _add_run(export)
    export.add_argument("--out", help="the folder to write (default: hf/ in the run folder)")

    generate = _command(subparsers, "generate", commands.generate, "let a checkpoint write")
    _add_run(generate)
    generate.add_argument("--prompt", default="", help="text to go on from")
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    generate.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0: all")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that sum to p")
    generate.add_argument("--seed", type=int, default=0)

    report = _command(subparsers, "report", commands.report, "draw a run: report.html and PNG files")
    report.add_argument("run_folder", metavar="run", help="a run folder")


def _command(subparsers, name: str, function, summary: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=function)
    return parser


def _add_overrides(parser: argparse.ArgumentParser, example: str = "train.steps=100") -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"set a value, as {example}")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="run", help="a run folder, or one of its checkpoints")
    parser.add_argument("--average", action="store_true", help="take the averaged weights (train.average_decay)")
