"""The command line: `opsd check`, `train`, `cache-teacher`, `eval`, `report`, `compare` and `recipes`."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opsd import cache_command, compare, distributed, recipes, trainer
from opsd.check import check
from opsd.config import describe, is_flag, load_config, to_yaml
from opsd.errors import CheckpointError, ConfigError, Interrupted, RunError
from opsd.evaluate_model import check_output, evaluate_model, evaluation_config, is_used
from opsd.model_path import hub_notes
from opsd.models import progress_bars
from opsd.output import all_shown, drop_rest
from opsd.recipes.in_loop import lacking, why_lacking
from opsd.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a run that stopped, 2 for one that could not start.

    Output that cannot be shown changes neither the run nor the code.
    """
    try:
        with all_shown():
            return _main(argv)
    finally:
        drop_rest()


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="opsd", description="On-policy self-distillation of a language model.")
    parser.add_argument("--version", action="version", version=f"opsd {_version()}")
    parser.set_defaults(advice="")  # on memory; a command may have its own
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_check, _add_train, _add_cache_teacher, _add_eval, _add_report, _add_compare, _add_recipes):
        add(commands)
    known, rest = parser.parse_known_args(argv)
    try:
        with progress_bars(sys.stderr is not None and sys.stderr.isatty()):
            known.run(known, rest)
        return 0
    except (ConfigError, RunError, CheckpointError, torch.cuda.OutOfMemoryError) as error:
        code = 2 if isinstance(error, ConfigError) else 128 + error.signal if isinstance(error, Interrupted) else 1
        if getattr(error, "said", False):  # by another process
            return code
        out = isinstance(error, torch.cuda.OutOfMemoryError)
        message = f"the GPU is out of memory: {known.advice}\n{error}" if out else str(error)
    except KeyboardInterrupt:
        message, code = "stopped by the user", 130
    which = "" if distributed.launched_first() else f"process {os.environ['RANK']}: "
    print(f"opsd: {which}{message}", file=sys.stderr)
    return code


def _version() -> str:
    try:
        return metadata.version("opsd")
    except metadata.PackageNotFoundError:  # run from its source, not installed
        return "unknown"


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
        if not equals and pending and not pending[0].startswith("--"):
            value = pending.pop(0)
        elif not equals and not flag:
            raise ConfigError(f"--{name} needs a value")
        options.append((name, value if value or equals else "true"))
    return options


SMALLER = "lower optim.micro_batch_size or rollout.batch_size, or set model.gradient_checkpointing"


def _add_sources(parser: Any) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of sections and options; the command line wins")
    parser.add_argument("--preset", metavar="NAME", help="settings below those of the file: tiny, paper, sdft or sdpo")


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="look at what a training would work with, without training",
        usage="opsd check [--preset NAME] [--config FILE] [--section.option VALUE ...]",
        description="What opsd train with the same options would work with: model, prompts, data, how they are scored "
        "and the memory of a step; or all that is wrong, with exit code 2. Nothing is trained or written.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe(),
        allow_abbrev=False,
    )
    _add_sources(parser)
    parser.set_defaults(run=_check, advice=SMALLER)


def _check(known: argparse.Namespace, rest: Sequence[str]) -> None:
    problems = check(load_config(known.config, parse_overrides(rest), known.preset), partial(print, flush=True))
    if problems:
        raise ConfigError("\nopsd: ".join(problems))  # each as opsd train says it
    print("opsd train can start")


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model; without options: the embedded tiny set-up",
        usage="opsd train [--preset NAME] [--config FILE] [--resume RUN_DIR] [--print-config] "
        "[--section.option VALUE ...]",
        description="""\
examples:
  opsd train                                        the embedded tiny model and its data
  opsd train --model.path DIR_OR_HUB_ID --data.train problems.jsonl --data.eval held_out.jsonl --lora.enabled
  opsd train --resume runs/model-1 --optim.steps 200""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe(),
        allow_abbrev=False,
    )
    _add_sources(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with a run that was stopped; only optim.steps and the options of run and eval may be given besides",
    )
    parser.add_argument("--print-config", action="store_true", help="print all options as YAML and stop")
    parser.set_defaults(run=_train, advice=SMALLER)


def _train(known: argparse.Namespace, rest: Sequence[str]) -> None:
    overrides = parse_overrides(rest)
    if known.resume:
        for option in ("config", "preset", "print_config"):
            if getattr(known, option):
                raise ConfigError(f"--{option.replace('_', '-')} has no meaning with --resume")
        result = trainer.resume(known.resume, overrides)
    else:
        config = load_config(known.config, overrides, known.preset, complete=not known.print_config)
        if known.print_config:
            print(to_yaml(config), end="")
            return
        result = trainer.train(config)
    if not distributed.launched_first():
        return
    if result.evaluations:
        table = Table("", "accuracy", "95 % interval", "problems", "mean length", "truncated", title="accuracy")
        for name, e in result.evaluations.items():
            table.add_row(
                name, *_interval(e.accuracy, e), str(e.problems), f"{e.mean_length:.0f}", f"{e.truncated:.1%}"
            )
        Console().print(table)
    steps = "1 step" if result.summary["steps"] == 1 else f"{result.summary['steps']} steps"
    print(f"{steps}, {result.summary['tokens']:,} rollout tokens, {result.seconds:.0f} s")
    print(f"metrics and samples: {result.run_dir} (as a page: opsd report {result.run_dir})")
    if result.model_dir:
        print(f"model: {result.model_dir}")
    if best := result.summary["best"]:
        where = f": {result.run_dir / 'best'}" if (result.run_dir / "best").exists() else ""
        print(f"best evaluation: {best['accuracy']:.1%} after step {best['step']}{where}")


def _interval(value: float, bounds: Any) -> tuple[str, str]:
    return f"{value:.1%}", f"{bounds.low:.1%} to {bounds.high:.1%}"


def _add_cache_teacher(commands: Any) -> None:
    cache_command.add_command(commands, _add_sources, parse_overrides)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate a model: avg@k and pass@k with intervals",
        usage="opsd eval --model DIR --data FILE [--output FILE] [--context student|teacher] [--config FILE] "
        "[--section.option VALUE ...]",
        description="How often a model is right. The model of a run, RUN_DIR/model, is evaluated as in that run: its "
        "prompts, its settings of rollouts and evaluations, its types and its seed, unless others are given.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe(is_used),
        allow_abbrev=False,
    )
    parser.set_defaults(run=_eval, advice="lower eval.batch_size")
    parser.add_argument("--model", metavar="DIR", help="a model, or an adapter whose base is named in it (model.path)")
    parser.add_argument("--data", metavar="FILE", help="rows with problem and answer (data.eval)")
    parser.add_argument("--output", metavar="FILE", help="write a summary here, as JSON, and beside it every answer")
    parser.add_argument(
        "--context",
        choices=("student", "teacher"),
        default="student",
        help="whose prompt the model reads; the teacher's holds the solution",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of sections and options; the command line wins")


def _eval(known: argparse.Namespace, rest: Sequence[str]) -> None:
    config, origin = evaluation_config(known.model, known.data, known.config, parse_overrides(rest))
    output = Path(known.output) if known.output else None
    if output is not None:
        check_output(output)  # before the hours that the answers may take
    for line in [*([origin] if origin else []), *hub_notes(config.model.path)]:
        print(line, flush=True)
    report = evaluate_model(config, known.context)
    for line in report.notes:
        print(line)
    e = report.evaluation
    each = "1 answer" if e.samples == 1 else f"{e.samples} answers"
    print(f"{config.model.path} on {config.data.eval}, {known.context}'s prompts: {e.problems} problems, {each} each")
    table = Table("", "", "95 % interval")
    table.add_row("accuracy" if e.samples == 1 else f"avg@{e.samples}", *_interval(e.accuracy, e))
    for p in e.pass_at if e.samples > 1 or e.pass_at[0].value != e.accuracy else ():
        table.add_row(f"pass@{p.k}", *_interval(p.value, p))
    table.add_row("mean length", f"{e.mean_length:.0f}", "tokens")
    table.add_row("truncated", f"{e.truncated:.1%}", "")
    counts = {
        "answers not judged": e.undecided,
        "rows skipped": report.rows_skipped,
        "rows too long": report.rows_too_long,
    }
    for name, count in counts.items():
        if count:
            table.add_row(name, str(count), "")
    Console().print(table)
    if output is not None:
        print(f"summary: {output}\nanswers: {report.write(output)}")


def _add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="write one HTML page about a run, or about several side by side")
    parser.set_defaults(run=_report)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run directory")
    where = "default: RUN/report.html, for several runs opsd-report.html here"
    parser.add_argument("--output", metavar="FILE", help=where)
    parser.add_argument("--samples", metavar="N", type=int, default=40, help="rollouts in the token view (40)")


def _report(known: argparse.Namespace, rest: Sequence[str]) -> None:
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; accepted: RUN ..., --output FILE, --samples N")
    if known.samples < 0:
        raise ConfigError(f"--samples is {known.samples}; accepted: integer >= 0")
    print(f"report: {write_report(known.runs, known.output, max_samples=known.samples)}")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="train several methods on the same data, seeds and budget; a table and a plot",
        usage="opsd compare --recipes NAME,NAME,... [--seeds N] [--output DIR] [--preset NAME] [--config FILE] "
        "[--section.option VALUE ...]",
        description="Without a model: on the embedded set-up. The same command again goes on where it was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe(),
        allow_abbrev=False,
    )
    parser.set_defaults(run=_compare, advice="lower optim.micro_batch_size or rollout.batch_size")
    parser.add_argument(
        "--recipes", metavar="NAMES", required=True, help="methods, see opsd recipes; full, sampled_token"
    )
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="runs of each, from run.seed on (3)")
    parser.add_argument("--output", metavar="DIR", default="runs/compare", help="runs, table and plot (runs/compare)")
    parser.add_argument("--config", metavar="FILE", help="YAML file of sections and options; the command line wins")
    parser.add_argument("--preset", metavar="NAME", help="settings below those of the file: paper, sdft or sdpo")


def _compare(known: argparse.Namespace, rest: Sequence[str]) -> None:
    names = [name.strip() for name in known.recipes.split(",")]
    result = compare.compare(
        names, known.seeds, known.output, source=known.config, overrides=parse_overrides(rest), preset=known.preset,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    shown = Table("", "accuracy", "95 % interval", title=f"{known.seeds} seed(s)")
    for name, found in [
        ("before training", result["base"]),
        ("teacher", result["teacher"]),
        *result["methods"].items(),
    ]:
        if found:
            shown.add_row(name, f"{found['value']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}")
    Console().print(shown)
    drawn = "compare.png" if compare.PLOTS else "no plot, since matplotlib is not installed"
    print(f"results: {Path(known.output) / 'compare.json'}, compare.md, {drawn}")


def _add_recipes(commands: Any) -> None:
    parser = commands.add_parser("recipes", help="list the methods of the family: what each needs, and its source")
    parser.set_defaults(run=_recipes)


def _recipes(known: argparse.Namespace, rest: Sequence[str]) -> None:
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; accepted: nothing")
    for name, recipe in ((name, recipes.make(name)) for name in recipes.names()):
        missing = lacking(recipe)
        loop = f"in a trainer of your own: the loop has no {', '.join(missing)}" if missing else "in the loop too"
        loop += f" ({why_lacking(recipe)})" if missing else ""
        print(f"{name}  ({f'arXiv {recipe.paper}' if recipe.paper else 'no paper found'}; {recipe.source})")
        print(f"  reads {', '.join(recipe.contexts) or 'no other context'}; {loop}")
