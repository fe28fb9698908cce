"""`train` and `resume`: a run from its options to its result, and on from where it stopped as if it never had."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from opsd import distributed, models, threads
from opsd.config import Config, load_config, to_yaml
from opsd.display import Display
from opsd.errors import ConfigError, Interrupted, RunError, config_error
from opsd.evaluation import Evaluation
from opsd.files import replace_file
from opsd.identity import check_identity, describe, digest_inputs
from opsd.limits import PATHS
from opsd.loop import Loop
from opsd.model_path import hub_notes
from opsd.options import EvalConfig
from opsd.plugins import Callback, Callbacks, Divergence, Evaluate, MakeTeacher, Parts, Sampler, check_callbacks
from opsd.push import make_repository, push
from opsd.run import Step
from opsd.run_dir import (
    LOCK,
    ReadOnly,
    RunDir,
    check_new,
    check_resumable,
    check_writable,
    locked,
    make_directory,
    read_description,
    write_json,
)
from opsd.setup import Setup, absolute_paths, embedded, introduce, set_up
from opsd.sharding import reread, shard
from opsd.teachers import ModelTeacher
from opsd.trackers import check_trackers, make_trackers

MEASURE = {f"eval.{name}" for name in EvalConfig.model_fields} - {
    f"eval.{name}" for name in ("every", "keep_best", "patience", "batch_size")
}
"""Options that change what an evaluation measures."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves. `evaluations` holds "base", "teacher" and "trained" where there was data for them."""

    run_dir: Path
    model_dir: Path | None
    evaluations: dict[str, Evaluation]
    seconds: float
    summary: dict[str, Any]


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    rollouts: Sampler | None = None,
    teacher: MakeTeacher | None = None,
    loss: Divergence | None = None,
    evaluate: Evaluate | None = None,
    step: Step | None = None,
    callbacks: Iterable[Callback] = (),
    quiet: bool = False,
) -> RunResult:
    """Train as `config` says; everything written goes to the run directory.

    Args:
        config: from `opsd.load_config`, or what it takes: nested sections, or the path of a YAML file.
        rollouts: in place of sampling from the student; see `opsd.plugins.Sampler`.
        teacher: makes the teacher; see `opsd.teachers.make_teacher` and `opsd.run.Teacher`.
        loss: in place of the objective; see `opsd.plugins.Divergence`.
        evaluate: in place of `opsd.evaluation.Evaluator`; see `opsd.plugins.Evaluate`.
        step: in place of the whole step; see `opsd.run.Step`.
        callbacks: functions of (run, record), called after each step; see `opsd.plugins.Callback`.
        quiet: print nothing.

    Raises:
        ConfigError: the run cannot start as asked (`DataError` for a row that cannot be used).
        NonFiniteError: before the optimiser would have used a non-finite loss or gradient.
        Interrupted: on the first Ctrl-C or SIGTERM, once the step is done and a checkpoint is written; on the second.
        WriteError: a file of the run cannot be written.
        RunError: something else stopped the run between two steps, a scorer that failed, say.
        TypeError, ValueError: what was given in place of a part returned something that cannot be used.
    """
    callbacks = check_callbacks(callbacks)
    config = absolute_paths(config if isinstance(config, Config) else load_config(config))
    options = config.run
    # Those of the embedded model, which is small, would only flash by.
    bars = models.progress_bars(not quiet and config.model.path is not None)
    with ExitStack() as held:
        held.enter_context(distributed.joined(options.device, options.process_minutes))
        display = Display(every=options.log_every, steps=config.optim.steps, quiet=quiet or distributed.rank() > 0)
        held.enter_context(display)
        held.enter_context(bars)
        directory = distributed.of_first(lambda: _place(options.dir))
        name = Path(config.model.path).name if config.model.path else "tiny"
        if config.model.path is None:
            config = distributed.of_first(partial(embedded, config, display))
        check_trackers(options.trackers)
        distributed.of_first(partial(make_repository, options))
        for note in hub_notes(config.model.path, config.teacher.path):
            display.note(note)
        parts = Parts(rollouts, teacher, loss, evaluate, step)
        setup = set_up(config, parts)
        described = describe(setup)
        distributed.check_same(described["identity"])

        def begin() -> tuple[Path, str]:
            with config_error("run.dir: the run directory cannot be written", OSError):
                made = make_directory(directory, name)
                held.enter_context(locked(made))
                check_new(options.dir)  # again: another process may have been at work in the meantime
                (made / "evaluations.jsonl").unlink(missing_ok=True)  # of an attempt that finished no step
                _describe_run(made, config, described)
            return made, described["id"]

        loop = _loop(setup, parts, _run_dir(*distributed.of_first(begin)), display)
        del setup  # which still has the whole head
        return _run(loop, callbacks)


def resume(
    run_dir: str | Path,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    rollouts: Sampler | None = None,
    teacher: MakeTeacher | None = None,
    loss: Divergence | None = None,
    evaluate: Evaluate | None = None,
    step: Step | None = None,
    callbacks: Iterable[Callback] = (),
    quiet: bool = False,
) -> RunResult:
    """Go on with the run in `run_dir` from its newest usable checkpoint, or from its start if it has none.

    A run that is finished, by its last step or by eval.patience, trains no further unless `overrides` make it longer.
    On one machine with the same number of threads the weights come out as if the run had never stopped, bit for bit on
    a CPU. Callables are to be those that the run began with.

    Args:
        run_dir: a run directory that `train` made.
        overrides: (dotted option, value) pairs; `optim.steps`, the sections eval and run, and the paths of model,
            teacher and data may change, these if the same things lie there. Other steps also change the learning rates
            of a schedule that ends at 0; what an evaluation measures, if changed, makes the count for the best one new.

    Raises:
        ConfigError: the directory holds no run, or what a run left at its end and no checkpoint; another process works
            on it, another option would change, or model, teacher or data have changed since.
        CheckpointError: there are checkpoints, and none can be used.
        Others: as `train`.
    """
    callbacks = check_callbacks(callbacks)
    run_dir, overrides = Path(run_dir), list(overrides)
    described = read_description(run_dir)
    began = load_config(run_dir / "config.yaml")
    config = absolute_paths(load_config(run_dir / "config.yaml", overrides))
    with ExitStack() as held:
        held.enter_context(distributed.joined(config.run.device, config.run.process_minutes))

        def begin() -> None:
            held.enter_context(locked(run_dir))
            check_resumable(run_dir)

        distributed.of_first(begin)
        changed = _changes(began, config)
        quiet = quiet or distributed.rank() > 0
        display = held.enter_context(Display(every=config.run.log_every, steps=config.optim.steps, quiet=quiet))
        held.enter_context(models.progress_bars(not quiet))
        check_trackers(config.run.trackers)
        distributed.of_first(partial(make_repository, config.run))
        began_at = datetime.fromisoformat(described["created"])
        parts = Parts(rollouts, teacher, loss, evaluate, step)
        setup = set_up(config, parts, began_at)
        digests = digest_inputs(setup)  # of the initial weights
        same_rows = "eval.max_problems" not in changed
        setup.warnings.extend(check_identity(digests, described, setup.run.device, same_evaluation=same_rows))
        loop = _loop(setup, parts, _run_dir(run_dir, described["id"]), display)
        del setup  # which still has the whole head
        loop.restore(same_measure=not changed & MEASURE)
        distributed.of_first(lambda: _describe_run(run_dir, config, {**described, "identity": digests}))
        return _run(loop, callbacks, resumed=True)


def _loop(setup: Setup, parts: Parts, run_dir: RunDir, display: Display) -> Loop:
    """The loop around `setup`, whose weights several processes divide where they train all of them.

    A teacher that is a copy of the model is divided like it; another model is whole in each process.
    """
    run, count, own = setup.run, distributed.size(), [name for name, part in vars(parts).items() if part is not None]
    if count == 1 or run.config.lora.enabled:
        return Loop(setup, run_dir, display)
    if own or not run.config.run.shard:
        setup.notes.append(f"weights: whole in each process, {f'since {own[0]} is your own' if own else 'as asked'}")
        return Loop(setup, run_dir, display)
    shard(run.model)
    teacher, model = run.teacher, run.model
    if isinstance(teacher, ModelTeacher) and teacher.model is not model and run.config.teacher.kind != "model":
        model = teacher.model
        shard(model)
        teacher.follow(run.model)
    if run.config.teacher.kind != "model":
        teacher.head = reread(teacher.head, model)
    shares = f"divided among {count} processes, with their gradients and the optimiser's state"
    setup.notes.append(f"weights: {shares}; each context in a pass of its own")
    run = replace(run, head=reread(run.head, run.model), joint=False, sharded=True)
    return Loop(replace(setup, run=run), run_dir, display)


def _run_dir(path: Path, run_id: str) -> RunDir:
    """The directory as this process uses it; of several, the first one writes."""
    return ReadOnly(path, run_id) if distributed.rank() else RunDir(path, run_id)


def _place(name: str | None) -> Path | None:
    """`run.dir`, which a new run may use as it looks before all is loaded."""
    directory = check_new(name)
    check_writable(directory)
    if directory is not None and (directory / LOCK).exists():
        with suppress(OSError), locked(directory):
            pass  # refuses now what it would refuse once all is loaded
    return directory


def _run(loop: Loop, callbacks: tuple[Callback, ...], *, resumed: bool = False) -> RunResult:
    """Has `loop` come to its end, with trackers."""
    config, run_dir, step = loop.config, loop.run_dir, loop.progress.step
    introduce(loop.setup, run_dir.path, loop.display)
    if loop.run.device.type == "cpu" and (waiting := threads.advice()):
        loop.display.warn(waiting)
    if step:
        finished = loop.finished()
        loop.display.note(f"the run is finished: {finished}" if finished else f"going on after step {step}")
    trackers = make_trackers(
        None if distributed.rank() else config.run.trackers,
        run_dir=run_dir.path,
        config=config.model_dump(),
        resume_step=step if resumed else None,
        warn=loop.display.warn,
    )
    loop.observers.extend([trackers, Callbacks(callbacks, loop.run)])
    try:
        with trackers, distributed.told():
            summary = loop.run_to_end()
    except ConfigError as error:  # of a scorer, say; the run could start
        raise RunError(f"{error}; {run_dir.what_is_safe()}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped by the user; {run_dir.what_is_safe()}") from None
    model_dir = run_dir.path / "model" if summary["model"] else None
    if model_dir and config.run.push_to_hub and distributed.rank() == 0:
        push(config.run.push_to_hub, model_dir, loop.display.warn)
    evaluations = {name: Evaluation.of(values) for name, values in summary["evaluations"].items()}
    return RunResult(run_dir.path, model_dir, evaluations, summary["seconds"], summary)


def _describe_run(directory: Path, config: Config, described: Mapping[str, Any]) -> None:
    replace_file(directory / "config.yaml", to_yaml(config))
    write_json(directory / "run.json", described)


def _changes(began: Config, config: Config) -> set[str]:
    """The options in which a resumed run differs, if all of them may; else a ConfigError."""
    now = config.options()
    changed = {name for name, value in began.options().items() if now[name] != value}
    for name in sorted(changed):
        free = name.startswith(("eval.", "run.")) or name == "optim.steps" or name in PATHS
        if not free or name in ("run.seed", "run.dir"):
            raise ConfigError(
                f"{name} is {now[name]!r}, the run began with {began.options()[name]!r}; a resumed run may change "
                f"optim.steps, {', '.join(PATHS)} and the sections eval and run, but for run.seed and run.dir"
            )
    return changed
