"""The command line: `opsd train [--config FILE] [--section.option VALUE ...]`, `opsd report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from opsd.config import Config, ConfigError, describe, is_flag, load_config, to_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a run that stopped, 2 for one that could not start."""
    parser = argparse.ArgumentParser(prog="opsd", description="On-policy self-distillation of a language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser(
        "train",
        help="train a model; without options: the embedded tiny set-up",
        usage="opsd train [--config FILE] [--print-config] [--section.option VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe(),
        allow_abbrev=False,
    )
    training.add_argument("--config", metavar="FILE", help="YAML file of sections and options; the command line wins")
    training.add_argument("--print-config", action="store_true", help="print all options as YAML and stop")
    reporting = commands.add_parser("report", help="write one HTML page about a run, or about several side by side")
    reporting.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    where = "default: RUN/report.html, for several runs opsd-report.html here"
    reporting.add_argument("--output", metavar="FILE", help=where)
    reporting.add_argument("--samples", metavar="N", type=int, default=40, help="rollouts in the token view (40)")
    known, rest = parser.parse_known_args(argv)
    try:
        if known.command == "report":
            return _report(known, rest)
        config = load_config(known.config, parse_overrides(rest))
        if known.print_config:
            print(to_yaml(config), end="")
            return 0
        return _train(config)
    except ConfigError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("stopped by the user", 130)


def parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Options from ``--section.option VALUE`` and ``--section.option=VALUE``; a flag may stand without a value.

    Raises:
        ConfigError: a word that is no option, an unknown option, or one without its value.
    """
    options: list[tuple[str, str]] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected {word!r}; options are spelt --section.option VALUE")
        name, equals, value = word[2:].partition("=")
        flag = is_flag(name)
        if not equals:
            if pending and not pending[0].startswith("--"):
                value = pending.pop(0)
            elif flag:
                value = "true"
            else:
                raise ConfigError(f"--{name} needs a value")
        options.append((name, value))
    return options


def _train(config: Config) -> int:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from opsd.trainer import Interrupted, NonFiniteError, train

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        result = train(config)
    except NonFiniteError as error:
        return _fail(str(error), 1)
    except Interrupted as error:
        return _fail(str(error), 130)
    except torch.cuda.OutOfMemoryError as error:
        advice = "lower optim.micro_batch_size or rollout.batch_size, or set model.gradient_checkpointing"
        return _fail(f"the GPU is out of memory: {advice}\n{error}", 1)
    table = Table(title="accuracy" if result.evaluations else None)
    if result.evaluations:
        for column in ("", "accuracy", "95 % interval", "problems", "mean length", "truncated"):
            table.add_column(column)
        for name, e in result.evaluations.items():
            interval = f"{e.low:.1%} to {e.high:.1%}"
            row = (name, f"{e.accuracy:.1%}", interval, str(e.problems), f"{e.mean_length:.0f}", f"{e.truncated:.1%}")
            table.add_row(*row)
        Console().print(table)
    print(f"{result.summary['steps']} steps, {result.summary['tokens']:,} rollout tokens, {result.seconds:.0f} s")
    print(f"metrics and samples: {result.run_dir}")
    if result.model_dir:
        print(f"model: {result.model_dir}")
    return 0


def _report(known: argparse.Namespace, rest: Sequence[str]) -> int:
    from opsd.report import write_report

    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; accepted: RUN ..., --output FILE, --samples N")
    if known.samples < 0:
        raise ConfigError(f"--samples is {known.samples}; accepted: integer >= 0")
    print(f"report: {write_report(known.runs, known.output, max_samples=known.samples)}")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"opsd: {message}", file=sys.stderr)
    return code
