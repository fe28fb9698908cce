"""Runs measurements on a GPU one by one, each in a process of its own, within a budget of time, and keeps the results.

A device error that is sticky, a hang or a crash ends one process and no other. A measurement of several contenders
says which of them it is about to run: where its process dies, the parent repeats it without that contender. Everything
found so far is in one JSON file, replaced whole after each measurement, so that a kill loses at most the one in flight
and a later command goes on from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.cells import Unavailable
from benchmarks.machine import machine
from benchmarks.record import DRY_NAME, NAME, Results, write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SECONDS = 560.0  # of a command of ten minutes, less the time to start and to write
SPARE = 5.0  # seconds between the end of a measurement and that of the budget
STICKY = 70  # exit status of a process whose device does not answer any more

T = TypeVar("T")


# In the process of one measurement.


class Report:
    """What a measurement tells its parent while it runs. Without a path nothing is written."""

    def __init__(
        self,
        device: torch.device,
        path: Path | None = None,
        *,
        without: Mapping[str, str] | None = None,
        deadline: float = math.inf,
        inject: Sequence[str] = (),
        rounds: int | None = None,
        contenders: Sequence[str] | None = None,
    ):
        self.device, self.path, self.deadline, self.inject = device, path, deadline, list(inject)
        self.rounds, self.contenders = rounds, contenders
        #: by contender, {"skipped": reason} or {"failed": reason}
        self.out: dict[str, dict[str, str]] = {name: {"failed": why} for name, why in (without or {}).items()}
        self._running: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that were asked for: all, or the chosen ones."""
        return [name for name in names if not self.contenders or name in self.contenders]

    def attempt(self, name: str, run: Callable[[], T]) -> T | None:
        """What `run` returns for the contender `name`; None, and an entry in `out`, where it fails or has failed."""
        if name in self.out:
            return None
        self._running.append(name)
        self._tell(running=name)
        result, entry, healthy = None, None, True
        try:
            fail_if_told(self.inject, name)
            result = run()
            synchronize(self.device)  # so that an error is this contender's
        except Unavailable as error:
            entry = {"skipped": str(error)}
        except torch.OutOfMemoryError:
            entry = {"skipped": "out of memory"}
        except Exception as error:  # the other contenders are worth having
            entry = {"failed": described(error)}
            healthy = answers(self.device)
        if entry is not None:
            result = None
            self.out[name] = entry
            print(f"  {name}: {' '.join(f'{kind}: {why}' for kind, why in entry.items())}", flush=True)
            if not healthy:
                self._tell(running=name, reason=entry["failed"])
                sys.stdout.flush()
                os._exit(STICKY)
            release(self.device)  # outside of the handlers: an exception holds its frames, and they what was computed
        self._running.pop()
        self._tell(running=self._running[-1] if self._running else None)
        return result

    def _tell(self, **state: Any) -> None:
        if self.path is not None:
            write_json(self.path, state)


def fail_if_told(inject: Sequence[str], name: str) -> None:
    """Faults for the tests: "raise:NAME", "abort:NAME" and "hang:NAME"."""
    if f"raise:{name}" in inject:
        raise RuntimeError("injected")
    if f"abort:{name}" in inject:
        os.abort()
    if f"hang:{name}" in inject:
        time.sleep(1e6)


def described(error: BaseException) -> str:
    """The error with the place that raised it, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{at}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    """Whether the device can still be used by this process: after an illegal access it cannot."""
    try:
        synchronize(device)
        torch.ones(1, device=device).item()
    except Exception:
        return False
    return True


def release(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault of the device there is nothing left to give back
            torch.cuda.empty_cache()


# What there is to measure.


@dataclass(frozen=True)
class Item:
    """One measurement: "step/what", and about how many seconds it takes on a GPU. It is not begun with less left, and
    stopped after `limit` or three times as much, or once one contender's turn lasts longer than `patience`."""

    name: str
    seconds: float
    run: Callable[[Report], dict[str, Any]] = field(compare=False)
    patience: float = 60.0
    limit: float | None = None
    #: whether what was found before still holds on this machine
    holds: Callable[[dict[str, Any]], bool] = field(default=lambda _: True, compare=False)

    @property
    def step(self) -> str:
        return self.name.partition("/")[0]

    @property
    def longest(self) -> float:
        return self.limit or 3 * self.seconds + 30


# The command.


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), metavar="DIR",
        help=f"where {NAME} is, which is added to; default: $OUT, else benchmarks/results")  # fmt: skip
    add("--from", dest="known", nargs="+", type=Path, default=[], metavar="FILE",
        help="results of earlier commands, which are taken over first")  # fmt: skip
    add("--only", nargs="+", default=[], metavar="NAME", help="steps or parts of names of measurements, see --list")
    add("--contenders", nargs="+", metavar="NAME", help="of the measurements that have several")
    add("--rounds", type=int, help="of the measurements that have several")
    add("--seconds", type=float, default=SECONDS, help="the budget of this command (%(default)s)")
    add(
        "--limit",
        type=float,
        help="seconds after which a measurement, or a contender's turn, is stopped; default: from its estimate",
    )
    add("--again", action="store_true", help="also what was measured, or failed, before")
    add("--list", action="store_true", help="run nothing: the measurements, with about the seconds of each")
    add("--table", action="store_true", help="run nothing: make the documents' tables")
    add("--here", action="store_true", help="all in this process, which an error of the device then spoils")
    add("--dry-run", action="store_true", help=f"on the CPU at toy sizes, to {DRY_NAME}")
    for hidden in ("--item", "--report", "--without"):  # for the process of one measurement
        add(hidden, help=argparse.SUPPRESS)
    add("--inject", nargs="+", default=[], help=argparse.SUPPRESS)


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if options.dry_run else "cuda")


Tables = Callable[[dict[str, Any]], dict[str, str]]
"""From a file's data to the documents' sections, by name."""


def main(
    module: str,
    description: str,
    items_of: Callable[[torch.device], list[Item]],
    tables: Tables,
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of `python -m MODULE`. 0: all that there is was measured and nothing failed; 1: something
    failed; 2: wrong arguments; 3: nothing failed, and something is left for another command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_options(parser)
    options = parser.parse_args(arguments)
    if options.inject and not options.dry_run:
        parser.error("--inject is for --dry-run")
    items = items_of(_device(options))
    if options.item:
        return _child({item.name: item for item in items}[options.item], options)
    steps = {item.step for item in items}
    chosen = [i for i in items if not options.only or any(_named(i, n, steps) for n in options.only)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: no such measurement; --list names them")
    if options.list:
        for item in chosen:
            print(f"{item.seconds:6.0f} s  {item.name}")
        return 0
    path = options.out / (DRY_NAME if options.dry_run else NAME)
    try:
        results = Results(path, options.dry_run)
        for known in options.known:
            results.merge(json.loads(known.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"the results cannot be read: {described(error)}")
    if options.table:
        return _write_tables(results, tables)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run does without")
    results.write()
    return _run_all(module, chosen, results, options, list(sys.argv[1:] if arguments is None else arguments))


def _named(item: Item, name: str, steps: set[str]) -> bool:
    return item.step == name if name in steps else name in item.name


def _write_tables(results: Results, tables: Tables) -> int:
    from benchmarks.report import replace_section

    made = tables(results.data)
    for text in made.values():
        print(f"{text}\n")
    if results.data["dry_run"]:
        print("The documents are left as they are: a dry run measures nothing.", file=sys.stderr)
        return 2
    for name, text in made.items():
        replace_section(name, text)
    return 0


def _run_all(
    module: str, chosen: list[Item], results: Results, options: argparse.Namespace, arguments: list[str]
) -> int:
    deadline = time.monotonic() + options.seconds
    if options.again:
        for item in chosen:
            results.data["faults"].pop(item.name, None)
    todo = [item for item in chosen if options.again or not _known(item, results.data)]
    for item in todo:
        if options.here:
            found = _here(item, options, deadline)
            results.note("failed", item.name, found["error"]) if "error" in found else results.keep(item.name, found)
            continue
        left = deadline - time.monotonic()
        if left < (0.0 if options.dry_run else item.seconds):
            results.note("left_out", item.name, "the time is used up")
            continue
        _protected(module, item, results, options, deadline)
    failed = [item.name for item in chosen if item.name in results.data["failed"]]
    wrong = [item.name for item in chosen if _wrong(results.data["cells"].get(item.name, {}))]
    left_out = [item.name for item in chosen if item.name in results.data["left_out"]]
    done = sum(item.name in results.data["cells"] for item in chosen)
    print(f"\n{results.path}: {done} of {len(chosen)} measured, {len(failed)} failed, {len(left_out)} left out")
    for kind, names in (("failed", failed), ("with faults", wrong), ("left out", left_out)):
        if names:
            print(f"{kind}: {', '.join(names)}")
    if left_out:
        print(f"to go on: python -m {module} {shlex.join(a for a in arguments if a != '--again')}")
        print(f"  and where {options.out} does not outlast this command: --from PATH/TO/{results.path.name}")
    return 1 if failed or wrong else 3 if left_out else 0


def _known(item: Item, data: dict[str, Any]) -> bool:
    cell = data["cells"].get(item.name)
    return item.name in data["failed"] if cell is None else item.holds(cell)


def _wrong(cell: dict[str, Any]) -> bool:
    """Whether a cell that was measured has something to be looked at."""
    return cell.get("agree") is False or any("failed" in one for one in cell.get("contenders", {}).values())


def _here(item: Item, options: argparse.Namespace, deadline: float, report: Report | None = None) -> dict[str, Any]:
    """What a measurement finds, with its machine; {"error": why} where there is nothing."""
    device = _device(options)
    report = report or Report(
        device, deadline=deadline, inject=options.inject, rounds=options.rounds, contenders=options.contenders
    )
    begun = time.monotonic()
    print(f"== {item.name}", flush=True)
    try:
        fail_if_told(options.inject, item.name)
        found = item.run(report)
    except (Unavailable, torch.OutOfMemoryError) as error:
        reason = str(error) if isinstance(error, Unavailable) else "out of memory"
        found = {"unavailable": reason}
        print(f"  not to be had here: {reason}", flush=True)
    except Exception as error:
        traceback.print_exc()
        return {"error": described(error)}
    finally:
        release(device)
    return {"machine": machine(device), "took": round(time.monotonic() - begun, 1), **found}


def _child(item: Item, options: argparse.Namespace) -> int:
    path = Path(options.report)
    without = json.loads(options.without or "{}")
    report = Report(
        _device(options), path, without=without, deadline=time.monotonic() + options.seconds, inject=options.inject,
        rounds=options.rounds, contenders=options.contenders,
    )  # fmt: skip
    found = _here(item, options, report.deadline, report)
    write_json(path, found if "error" in found else {"found": found})
    sys.stdout.flush()
    os._exit(0)  # what an interpreter does at its end can hang or crash, too


def _protected(module: str, item: Item, results: Results, options: argparse.Namespace, deadline: float) -> None:
    """Measures `item` in a process of its own, again without each contender that ends it."""
    print(f"== {item.name}", flush=True)
    while True:
        left = deadline - SPARE - time.monotonic()
        limit = min(left, options.limit or item.longest)
        if limit <= 0:
            results.note("left_out", item.name, "the time is used up")
            return
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "report.json"
            command = [sys.executable, "-m", module, "--item", item.name, "--report", str(path)]
            command += ["--seconds", f"{0.85 * limit:.1f}", *_passed_on(options)]  # to come to an end by itself
            faults = results.faults(item.name)
            command += ["--without", json.dumps(faults)]
            turns = Turns(path, options.limit or item.patience)
            status, output = _spawn(command, limit, turns)
            stalled = status is None and turns.stalled()
            state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        print(_shown(output), flush=True)
        if "found" in state:
            if faults:
                state["found"]["faults"] = faults
            results.keep(item.name, state["found"])
            return
        if status is None and limit == left and not stalled:
            results.note("left_out", item.name, "stopped: the time was used up")
            return
        last = _last_line(output)
        reason = state.get("error") or state.get("reason")
        if reason is None:
            reason = _ended(status, time.monotonic() - begun) + (f": {last}" if last else "")
        culprit = state.get("running") if stalled or status is not None else None
        if culprit is None or culprit in faults:
            results.note("failed", item.name, reason)
            return
        print(f"{item.name}: {culprit} ended it ({reason}); again without, after {time.monotonic() - begun:.0f} s",
              flush=True)  # fmt: skip
        results.fault(item.name, culprit, reason)


def _passed_on(options: argparse.Namespace) -> Iterator[str]:
    if options.dry_run:
        yield "--dry-run"
    if options.rounds is not None:
        yield from ("--rounds", str(options.rounds))
    for name in ("contenders", "inject"):
        values = getattr(options, name)
        if values:
            yield from (f"--{name}", *values)


def _environment() -> dict[str, str]:
    """For subprocesses: they find this project, and print as they go."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@dataclass
class Turns:
    """Watches a report: whether a contender's turn has lasted too long."""

    path: Path
    patience: float

    def stalled(self) -> bool:
        try:
            since = self.path.stat().st_mtime
            running = json.loads(self.path.read_text(encoding="utf-8")).get("running")
        except (OSError, ValueError):
            return False
        return running is not None and time.time() - since > self.patience


def _ended(status: int | None, seconds: float) -> str:
    if status is None:
        return f"stopped after {seconds:.0f} s"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


_LIBC = ctypes.CDLL(None)


def _bound() -> None:
    """In a new process: a group of its own, to be stopped with all that it starts, which dies with its parent: nothing
    is left over that holds the device."""
    os.setpgrp()
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _spawn(command: list[str], limit: float, turns: Turns | None = None) -> tuple[int | None, str]:
    """(exit status, output); None where the process had to be stopped, with all that it had started."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT, preexec_fn=_bound
        )
        deadline = time.monotonic() + limit
        status: int | None = None
        try:
            while status is None and time.monotonic() < deadline and not (turns and turns.stalled()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(1.0, max(0.0, deadline - time.monotonic())))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return status, log.read()


def run_command(command: list[str], limit: float) -> tuple[int | None, list[str]]:
    """For measurements that are programs of their own: (exit status or None where stopped, lines of the output)."""
    status, output = _spawn(command, max(1.0, limit))
    return status, output.strip().splitlines()


def _last_line(output: str) -> str:
    """The last line that speaks of an error; indented ones are the measurement's own report."""
    errors = [line for line in output.splitlines() if "rror" in line and not line.startswith(" ")]
    return errors[-1].strip()[:300] if errors else ""


def _shown(output: str) -> str:
    """The output but for its first line, the name, shortened to its end."""
    lines = output.rstrip().splitlines()[1:]
    return "\n".join(["  ..."] * (len(lines) > 60) + lines[-60:])
