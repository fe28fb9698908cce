"""The loop around a step: evaluate, train, evaluate, save; and to go on after any interruption as if there was none."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import IO, Any, Protocol

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

import torch
from torch import nn

from opsd import checkpoint, models
from opsd.config import Config, ConfigError, EvalConfig, load_config, sections, to_yaml
from opsd.data import batches
from opsd.evaluate import Context, Evaluation
from opsd.evaluate import evaluate as score_answers
from opsd.metrics import Clock, Display, append_json, host_values, peak_memory, rewind_json
from opsd.optim import learning_rate, make_optimizer
from opsd.prompts import Example
from opsd.reasoning import analyse
from opsd.rollouts import Rollout
from opsd.setup import (
    MakeTeacher,
    Setup,
    absolute_paths,
    check_identity,
    check_objective,
    describe_run,
    embedded,
    introduce,
    set_up,
)
from opsd.step import OWN_NAMES, Divergence, Run, Sampler, Step, StepResult, opsd_step
from opsd.teachers import make_teacher
from opsd.token_view import token_view
from opsd.trackers import check_trackers, eval_values, make_trackers, train_values
from opsd.watch import Watch


class RunError(Exception):
    """A run stopped before its end; the message says why and what is safe."""


class NonFiniteError(RunError):
    """The loss or its gradient is infinite or not a number. The optimiser has not used it."""


class WriteError(RunError):
    """Something of the run cannot be written, a full disk for example."""


class Interrupted(RunError):
    """The run was asked to stop. `signal` is the number of the signal."""

    def __init__(self, message: str, signal: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal


LOCK = ".lock"

PATHS = ("model.path", "teacher.path", "data.train", "data.eval")
"""What a resumed run may find elsewhere; `check_identity` sees to it that it is the same."""


class Evaluate(Protocol):
    """An evaluation, in place of `opsd.evaluate.evaluate`: a function of (run, model, examples, context)."""

    def __call__(self, run: Run, model: nn.Module, examples: Sequence[Example], context: Context, /) -> Evaluation:
        """How well `model`, which is not always the student, answers under the prompts of `context`."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves. `evaluations` holds "base", "teacher" and "trained" where there was data for them."""

    run_dir: Path
    model_dir: Path | None
    evaluations: dict[str, Evaluation]
    seconds: float
    summary: dict[str, Any]


@dataclass
class Progress:
    """How far a run has come: with the weights, all that a checkpoint has to hold."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Of all processes that worked on the run, as of the last step."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    """Step and accuracy of the best evaluation in training."""
    since_best: int = 0
    last_record: dict[str, Any] = field(default_factory=dict)


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    rollouts: Sampler | None = None,
    teacher: MakeTeacher = make_teacher,
    loss: Divergence | None = None,
    evaluate: Evaluate | None = None,
    step: Step = opsd_step,
    quiet: bool = False,
) -> RunResult:
    """Train as `config` says; everything written goes to the run directory.

    Args:
        config: from `opsd.load_config`, or what it takes: nested sections, or the path of a YAML file.
        rollouts: in place of sampling from the student; see `opsd.step.Sampler`.
        teacher: makes the teacher; see `opsd.teachers.make_teacher` and `opsd.teachers.Teacher`.
        loss: in place of the objective; see `opsd.step.Divergence`.
        evaluate: in place of `opsd.evaluate.evaluate`; see `Evaluate`.
        step: in place of the whole step; see `opsd.step.Step`.
        quiet: print nothing.

    Raises:
        ConfigError: the run cannot start as asked (`DataError` for a row that cannot be used).
        NonFiniteError: before the optimiser would have used a non-finite loss or gradient.
        Interrupted: on the first Ctrl-C or SIGTERM, once the step is done and a checkpoint is written; on the second.
        WriteError: a file of the run cannot be written.
        RunError: something else stopped the run between two steps, a scorer that failed, say.
        TypeError, ValueError: what was given in place of a part returned something that cannot be used.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    config = absolute_paths(config)
    # Those of the embedded model, which is small, would only flash by.
    bars = models.progress_bars(not quiet and config.model.path is not None)
    with Display(every=config.run.log_every, quiet=quiet) as display, bars:
        run_dir = _check_run_dir(config)
        if run_dir is not None and (run_dir / LOCK).exists():
            with suppress(OSError):
                _lock(run_dir).close()  # refuses now what it would refuse once all is loaded
        name = Path(config.model.path).name if config.model.path else "tiny"
        if config.model.path is None:
            config = embedded(config, display)
        check_trackers(config.run.trackers)
        for note in models.hub_notes(config):
            display.note(note)
        setup = _with_parts(set_up(config, teacher), rollouts, loss)
        described = describe_run(setup)
        with ExitStack() as held:
            try:
                run_dir = _make_run_dir(name, run_dir)
                held.enter_context(_lock(run_dir))
                _check_run_dir(config)  # again: another process may have been at work in the meantime
                (run_dir / "evaluations.jsonl").unlink(missing_ok=True)  # of an attempt that finished no step
                checkpoint.replace_file(run_dir / "config.yaml", to_yaml(config))
                checkpoint.replace_file(run_dir / "run.json", _as_json(described))
            except OSError as error:
                raise ConfigError(f"run.dir: the run directory cannot be written: {error}") from error
            return _Loop(setup, run_dir, described["id"], display, step, evaluate).run()


def resume(
    run_dir: str | Path,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    rollouts: Sampler | None = None,
    teacher: MakeTeacher = make_teacher,
    loss: Divergence | None = None,
    evaluate: Evaluate | None = None,
    step: Step = opsd_step,
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
    run_dir, overrides = Path(run_dir), list(overrides)
    described = _read_description(run_dir)
    with _lock(run_dir):
        _refuse_anew(run_dir)
        began = load_config(run_dir / "config.yaml")
        config = absolute_paths(load_config(run_dir / "config.yaml", overrides))
        changed = _changes(began, config)
        with Display(every=config.run.log_every, quiet=quiet) as display, models.progress_bars(not quiet):
            check_trackers(config.run.trackers)
            setup = _with_parts(set_up(config, teacher), rollouts, loss)
            identity = setup.identity()  # of the initial weights
            same_rows = "eval.max_problems" not in changed
            differences = check_identity(setup, identity, described, same_evaluation=same_rows)
            setup.warnings.extend(differences)
            loop = _Loop(setup, run_dir, described["id"], display, step, evaluate)
            loop.restore(same_measure=not changed & MEASURE)
            checkpoint.replace_file(run_dir / "config.yaml", to_yaml(config))
            checkpoint.replace_file(run_dir / "run.json", _as_json({**described, "identity": identity}))
            return loop.run()


MEASURE = {f"eval.{f.name}" for f in dataclasses.fields(EvalConfig)} - {
    f"eval.{name}" for name in ("every", "keep_best", "patience", "batch_size")
}
"""Options that change what an evaluation measures."""


def _changes(began: Config, config: Config) -> set[str]:
    """The options in which a resumed run differs, if all of them may; else a ConfigError."""
    changed = set()
    for name, section in sections(began).items():
        for option, value in section.items():
            full, now = f"{name}.{option}", getattr(getattr(config, name), option)
            if now == value:
                continue
            free = name in ("eval", "run") or full == "optim.steps" or full in PATHS
            if not free or full in ("run.seed", "run.dir"):
                raise ConfigError(
                    f"{full} is {now!r}, the run began with {value!r}; a resumed run may change optim.steps, "
                    f"{', '.join(PATHS)} and the sections eval and run, but for run.seed and run.dir"
                )
            changed.add(full)
    return changed


class _Loop:
    """A run from wherever it stands to its end."""

    def __init__(
        self, setup: Setup, run_dir: Path, run_id: str, display: Display, step: Step, evaluate: Evaluate | None
    ):
        self.setup, self.run_dir, self.run_id, self.display = setup, run_dir, run_id, display
        self.step, self.evaluate = step, evaluate or partial(score_answers, scorer=setup.scorer)
        self.state, self.config = setup.run, setup.run.config
        self.optimizer = make_optimizer(setup.run.model, self.config)
        self.progress, self.watch = Progress(), Watch(self.config)
        self.trackers = make_trackers((), run_dir=run_dir, config={})
        self.saved_step = 0  #: of the newest checkpoint
        self.resumed, self.random_state = False, None  # type: bool, dict[str, Any] | None
        self.began = time.perf_counter()

    def run(self) -> RunResult:
        introduce(self.setup, self.run_dir, self.display)
        if self.progress.step:
            self.display.note(self._where_it_stands())
        self.trackers = make_trackers(
            self.config.run.trackers,
            run_dir=self.run_dir,
            config=asdict(self.config),
            resume_step=self.progress.step if self.resumed else None,
            warn=self.display.warn,
        )
        try:
            with self.trackers:
                if self.setup.eval_examples and not self.progress.evaluations:
                    self._evaluate_before()
                self._train()
                if self.setup.eval_examples and "trained" not in self.progress.evaluations:
                    # Resumed with less patience, or fewer steps, than had already passed.
                    result = self._evaluate(self.state.model, self.setup.eval_examples, "student")
                    self._evaluated("trained", result)
                model_dir = self._save_model(self.run_dir / "model") if self.config.run.save else None
                summary = self._summary(model_dir)
                with self._writing():
                    checkpoint.replace_file(self.run_dir / "summary.json", _as_json(summary))
        except ConfigError as error:  # of a scorer, say; the run could start
            raise RunError(f"{error}; {self._what_is_safe()}") from error
        except KeyboardInterrupt:
            raise Interrupted(f"stopped by the user; {self._what_is_safe()}") from None
        evaluations = {name: Evaluation.of(values) for name, values in self.progress.evaluations.items()}
        return RunResult(self.run_dir, model_dir, evaluations, summary["seconds"], summary)

    def _where_it_stands(self) -> str:
        step = self.progress.step
        if step >= self.config.optim.steps:
            return f"the run is finished: step {step} was the last; a higher optim.steps goes on from there"
        if self._out_of_patience():
            return (
                f"the run is finished: it stopped early after step {step}, by eval.patience "
                f"{self.config.eval.patience}; a higher one, or none, goes on from there"
            )
        return f"going on after step {step}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Where a file of the run is written: an error says what is safe."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError, checkpoint.CheckpointError) as error:
            raise WriteError(f"{error}; {self._what_is_safe()}") from error

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with self._writing():
            append_json(self.run_dir / f"{name}.jsonl", record)

    def restore(self, *, same_measure: bool = True) -> None:
        """Takes up the newest usable checkpoint, and takes back what was logged after it.

        `same_measure`: whether evaluations measure what they did, so that the best one so far still is.
        """
        self.resumed = True
        checkpoint.remove_unfinished(self.run_dir)
        found = checkpoint.latest_checkpoint(self._checkpoints, run_id=self.run_id, warn=self.display.warn)
        if found is None:
            self.display.note("no checkpoint was finished yet: the run starts anew")
            last = -1
        else:
            path, state = found
            try:
                checkpoint.load_trained_state(self.state.model, state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.state.teacher.load_state_dict(state["teacher"])
                self.progress = Progress(**state["progress"])
                self.watch.load_state_dict(state["watch"])
            except (ValueError, KeyError, TypeError) as error:
                raise checkpoint.CheckpointError(f"{path}: does not fit this run: {error}") from error
            self.random_state = state["random"]
            last = self.saved_step = self.progress.step
            if not same_measure and self.progress.best is not None:
                self.display.note("evaluations now measure something else: the count for the best one begins anew")
                self.progress.best, self.progress.since_best = None, 0
        (self.run_dir / "summary.json").unlink(missing_ok=True)
        for name in ("metrics", "evaluations", "samples"):
            rewind_json(self.run_dir / f"{name}.jsonl", last)

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _train(self) -> None:
        options, progress = self.config.optim, self.progress
        earlier = progress.seconds
        order = batches(len(self.setup.examples), options.batch_size, self.config.run.seed, start=progress.step)
        self.state.model.train()
        if self.random_state is not None:  # last of all, since loading and trackers may draw
            checkpoint.set_random_state(self.random_state)
        with _StopRequest(self.display) as stop:
            while progress.step < options.steps and not self._out_of_patience():
                progress.evaluations.pop("trained", None)  # of where an earlier process had ended
                batch = [self.setup.examples[i] for i in next(order)]
                record = self._one_step(batch, progress.step + 1)
                progress.step += 1
                progress.tokens += record["tokens"]
                progress.last_record = record
                progress.seconds = earlier + time.perf_counter() - self.began
                last = progress.step == options.steps
                every = self.config.eval.every
                if self.setup.eval_examples and (last or (every and progress.step % every == 0)):
                    self._evaluate_student("trained" if last else f"step {progress.step}")
                finished = last or self._out_of_patience()
                every = self.config.run.checkpoint_every
                if stop.signal or (every and (finished or progress.step % every == 0)):
                    self._checkpoint()
                if stop.signal and not finished:
                    raise Interrupted(f"stopped after step {progress.step}; {self._what_is_safe()}", stop.signal)

    def _one_step(self, batch: Sequence[Example], number: int) -> dict[str, Any]:
        """Loss, gradients, the check that both are finite, and only then the optimiser and the teacher's update."""
        run, config = self.state, self.config
        began, rate = time.perf_counter(), learning_rate(config.optim, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        first = Clock(run.device)
        told: dict[str, float] = {}
        if config.teacher.reason_first:
            with first("reason"):
                analysed = analyse(run, self.setup.prompter, batch, number)
            batch = analysed.examples
            told = {"analysis_length": analysed.mean_length, "analysis_truncated": analysed.truncated}
        result = self.step(run, batch, number)
        _check_step(result)
        clock = result.clock or Clock(run.device)
        with clock("samples"):  # by the weights that wrote and scored them
            samples = self._samples(batch, result.rollouts, number)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with clock("optimizer"):
            norm = nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm or math.inf)
            values = host_values({"loss": result.loss, "grad_norm": norm, **result.metrics, **told})
            for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
                if not math.isfinite(values[name]):
                    raise NonFiniteError(
                        f"step {number}: the {what} is {values[name]}; stopped before the optimiser, so the weights "
                        f"are those after step {number - 1}; {self._what_is_safe()}"
                    )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            run.teacher.update(number)
        phases = {f"seconds_{phase}": s for phase, s in (first.seconds() | clock.seconds()).items()}
        seconds = time.perf_counter() - began
        record: dict[str, Any] = {"step": number, **values, "lr": rate, "tokens": result.tokens}
        record |= {"tokens_per_second": result.tokens / seconds, "seconds": seconds, **phases}
        record["peak_memory_bytes"] = peak_memory(run.device)
        record["warnings"] = self.watch.check(record)
        self._append("metrics", record)
        self.trackers.log(number, train_values(record))
        text = "  ".join(f"{k} {record[k]:.4g}" for k in ("loss", "rollout_length", "grad_norm") if k in record)
        text += f"  {record['tokens_per_second']:.0f} tokens/s"
        self.display.advance("step", number, config.optim.steps, text)
        for warning in record["warnings"]:
            self.display.warn(f"step {number}: {warning}")
        for sample in samples:
            self._append("samples", sample)
            self.trackers.text(number, "samples/rollout", sample["rollout"])
        return record

    def _samples(self, batch: Sequence[Example], rollouts: Sequence[Rollout], number: int) -> list[dict[str, Any]]:
        """The first rollouts of the first two prompts, token by token, at the steps that are to show some."""
        every, each = self.config.run.sample_every, self.config.rollout.per_prompt
        if not every or (number > 1 and number % every):
            return []
        return [
            {
                "step": number,
                "source": example.row.source,
                "problem": example.row.problem_text,
                "rollout": self.state.tokenizer.decode(rollout.ids),
                "tokens": len(rollout.ids),
                "truncated": rollout.truncated,
                "view": token_view(self.state, example, rollout),
            }
            for example, rollout in list(zip(batch, rollouts[::each], strict=False))[:2]
        ]

    def _evaluate_before(self) -> None:
        examples = self.setup.eval_examples
        self._evaluated("base", self._evaluate(self.state.model, examples, "student"))
        if all(example.teacher for example in examples):
            if self.config.teacher.reason_first:
                examples = analyse(self.state, self.setup.prompter, examples, 0).examples
            with self.state.teacher.active() as told:
                self._evaluated("teacher", self._evaluate(told, examples, "teacher"))

    def _evaluate_student(self, name: str) -> None:
        """Evaluates the student and keeps count of the best; `keep_best` keeps its weights, too."""
        result = self._evaluate(self.state.model, self.setup.eval_examples, "student")
        self._evaluated(name, result)
        if not self.config.eval.every:
            return
        best = self.progress.best
        if best is not None and result.accuracy <= best["accuracy"]:
            self.progress.since_best += 1
        else:
            best = {"step": self.progress.step, "accuracy": result.accuracy}
            self.progress.best, self.progress.since_best = best, 0
            if self.config.eval.keep_best:
                self._save_model(self.run_dir / "best")
                base = self.progress.evaluations.get("base")
                if base is not None and result.accuracy <= base["accuracy"]:
                    self.display.note("the best so far, and no better than the model before training")
        if self._out_of_patience() and name != "trained":
            self.progress.evaluations["trained"] = asdict(result)
            than = f"{best['accuracy']:.1%} at step {best['step']}"
            worse = self.progress.since_best
            told = "1 evaluation was" if worse == 1 else f"{worse} evaluations were"
            self.display.note(f"stopped early: {told} no better than {than}")

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience is not None and self.progress.since_best >= patience

    def _evaluate(self, model: nn.Module, examples: Sequence[Example], context: Context) -> Evaluation:
        with models.evaluating(model), torch.no_grad():  # whatever a user's function does to it
            result = self.evaluate(self.state, model, examples, context)
        if not isinstance(result, Evaluation):
            raise TypeError(
                f"the evaluation function (evaluate) returned {type(result).__name__}; accepted: an opsd.Evaluation"
            )
        result.check()
        return result

    def _evaluated(self, name: str, result: Evaluation) -> None:
        peak_memory(self.state.device)  # starts anew, so that the next step reports its own
        self.display.note(f"accuracy, {name}: {result}")
        record = asdict(result)
        self._append("evaluations", {"step": self.progress.step, "name": name, **record})
        of = name if name in ("base", "teacher") else "eval"
        passes = {str(passed["k"]): passed["value"] for passed in record["pass_at"]}
        self.trackers.log(self.progress.step, eval_values({**record, "pass_at": passes}, of=of))
        if not name.startswith("step"):
            self.progress.evaluations[name] = record

    def _checkpoint(self) -> None:
        state = {
            "model": checkpoint.trained_state(self.state.model),
            "optimizer": self.optimizer.state_dict(),
            "teacher": self.state.teacher.state_dict(),
            "progress": asdict(self.progress),
            "watch": self.watch.state_dict(),
            "random": checkpoint.random_state(),
        }
        step, keep = self.progress.step, self.config.run.keep_checkpoints
        with self._writing():
            checkpoint.save_checkpoint(self._checkpoints, step, state, run_id=self.run_id, keep=keep)
        self.saved_step = step

    def _what_is_safe(self) -> str:
        if not self.saved_step and (self.run_dir / "model").exists():
            return f"the trained model is in {self.run_dir / 'model'}"
        if not self.saved_step:
            return f"no checkpoint was written yet, opsd train --resume {self.run_dir} starts anew"
        return f"opsd train --resume {self.run_dir} goes on after step {self.saved_step}"

    def _summary(self, model_dir: Path | None) -> dict[str, Any]:
        progress = self.progress
        return {
            "steps": progress.step,
            "seconds": progress.seconds,
            "tokens": progress.tokens,
            **self.setup.counts,
            "evaluations": progress.evaluations,
            "best": progress.best,
            "stopped_early": progress.step < self.config.optim.steps,
            "last_step": progress.last_record,
            "model": "model" if model_dir else None,
        }

    def _save_model(self, directory: Path) -> Path:
        """The model, or its adapter, and the tokenizer, for `from_pretrained`."""
        with self._writing(), models.progress_bars(False):  # they would break into the display's
            return checkpoint.replace_directory(directory, lambda fresh: save_model(self.state, fresh))


class _StopRequest:
    """While open, the first SIGINT or SIGTERM asks for a stop after the step, and the next one stops at once."""

    def __init__(self, display: Display):
        self.display, self.signal, self.former = display, 0, {}  # type: ignore[var-annotated]

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.former = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if not self.display.quiet:  # print would fail where the signal comes in the middle of a print
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")


def save_model(run: Run, directory: Path) -> None:
    """Writes the model, or its adapter, and the tokenizer to `directory`, for `from_pretrained`."""
    from transformers import GenerationConfig

    lm = models.causal_lm(run.model)
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:
        # Some published models carry generation settings that load and then refuse to be saved.
        lm.generation_config = GenerationConfig(eos_token_id=run.end_ids or None, pad_token_id=run.pad_id)
    run.model.save_pretrained(directory)  # type: ignore[operator]
    run.tokenizer.save_pretrained(directory)


def _check_step(result: Any) -> None:
    """Raises TypeError or ValueError if `result` is not what a `Step` has to return."""
    told = "the step function (step) returned"
    if not isinstance(result, StepResult):
        raise TypeError(f"{told} {type(result).__name__}; accepted: an opsd.step.StepResult")
    if not isinstance(result.loss, torch.Tensor) or result.loss.ndim:
        shape = tuple(result.loss.shape) if isinstance(result.loss, torch.Tensor) else repr(result.loss)
        raise TypeError(f"{told} a loss that is {shape}; accepted: a 0-d tensor")
    if not isinstance(result.tokens, int) or result.tokens < 0:
        raise TypeError(f"{told} tokens {result.tokens!r}; accepted: an int, how many rollout tokens there were")
    if not isinstance(result.metrics, Mapping):
        raise TypeError(f"{told} metrics of type {type(result.metrics).__name__}; accepted: a dict of numbers")
    for name, value in result.metrics.items():
        if not isinstance(name, str) or name in OWN_NAMES:
            raise ValueError(f"{told} a metric called {name!r}; accepted: text other than {', '.join(OWN_NAMES)}")
        if value.ndim if isinstance(value, torch.Tensor) else not isinstance(value, Real):
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise TypeError(f"{told} metric {name!r} {shown}; accepted: a number or a 0-d tensor")
    if not isinstance(result.rollouts, list) or not all(isinstance(rollout, Rollout) for rollout in result.rollouts):
        raise TypeError(f"{told} rollouts {result.rollouts!r:.80}; accepted: a list of opsd.Rollout, empty for none")


def _with_parts(setup: Setup, rollouts: Sampler | None, loss: Divergence | None) -> Setup:
    run = setup.run
    if loss is None:
        check_objective(run)
    run = dataclasses.replace(run, sample=rollouts or run.sample, divergence=loss or run.divergence)
    return dataclasses.replace(setup, run=run)


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _lock(run_dir: Path) -> IO[str]:
    """A file in `run_dir` that this process alone holds until it is closed.

    Raises:
        ConfigError: another process holds it.
    """
    file = (run_dir / LOCK).open("a+", encoding="utf-8")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{run_dir}: another process works on this run") from None
    return file


def _read_description(run_dir: Path) -> dict[str, Any]:
    try:
        described = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        described["id"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run_dir} is no run that can be resumed: its run.json cannot be read: {error}") from error
    return described


def _refuse_anew(run_dir: Path) -> None:
    """Without a checkpoint a resumed run starts anew, which must not cost what the run left at its end."""
    left = [name for name in ("model", "summary.json") if (run_dir / name).exists()]
    if left and not checkpoint.list_checkpoints(run_dir / "checkpoints"):
        raise ConfigError(
            f"{run_dir} holds {' and '.join(left)} of a finished run, but no checkpoint to go on from, so that it "
            "would start anew; begin another run in a new run.dir, or move what it left elsewhere"
        )


# All that a run leaves that was killed, or failed, before its first step was done: nothing that a new one would not
# write as well. Where processes cannot be told apart by a lock, only what is there before another would come.
EARLY = {LOCK, "config.yaml"} | ({"run.json", "evaluations.jsonl"} if fcntl else set())


def _check_run_dir(config: Config) -> Path | None:
    """`run.dir` of a run that begins.

    Raises:
        ConfigError: it is in use, or holds anything but what an attempt left that never finished a step.
    """
    if config.run.dir is None:
        return None
    directory = Path(config.run.dir)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"run.dir {config.run.dir!r} is a file; accepted: a directory, new or empty")
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if any(name not in EARLY and not name.startswith(checkpoint.UNFINISHED) for name in there):
        if "run.json" not in there:
            raise ConfigError(f"run.dir {config.run.dir!r} is not empty; accepted: a new directory or an empty one")
        raise ConfigError(
            f"run.dir {config.run.dir!r} already holds a run, which is never overwritten; name a new directory, or go "
            f"on with it: opsd train --resume {directory}"
        )
    return directory


def _make_run_dir(name: str, directory: Path | None) -> Path:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    name = re.sub(r"[^\w.-]+", "-", name) or "model"
    number = 1
    while True:
        try:
            (Path("runs") / f"{name}-{number}").mkdir(parents=True)
            return Path("runs") / f"{name}-{number}"
        except FileExistsError:
            number += 1
