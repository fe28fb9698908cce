"""The loop around a step: batches -> step -> finite? -> optimiser and teacher -> observers, with evaluations and
checkpoints in between."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from opsd import checkpoint, distributed
from opsd.clock import Clock, host_values, peak_memory
from opsd.data import batches
from opsd.display import Display
from opsd.errors import CheckpointError, Interrupted, NonFiniteError
from opsd.evaluation import Context, Evaluation
from opsd.optim import learning_rate, make_optimizer
from opsd.plugins import check_evaluation, check_step_result
from opsd.progress import Progress, StopRequest
from opsd.prompts import Example
from opsd.reasoning import analyse
from opsd.run import Observer, StepResult
from opsd.run_dir import RunDir
from opsd.setup import Setup
from opsd.token_view import token_view
from opsd.watch import Watch
from opsd_kernels.probe import evaluating


class Loop:
    """A run from wherever it stands to its end."""

    def __init__(self, setup: Setup, run_dir: RunDir, display: Display):
        self.setup, self.run, self.config = setup, setup.run, setup.run.config
        self.run_dir, self.display = run_dir, display
        self.observers: list[Observer] = [run_dir, display]
        self.optimizer = make_optimizer(self.run.model, self.config.optim)
        self.progress, self.watch = Progress(), Watch(self.config)
        self.random_state: dict[str, Any] | None = None
        self.began = time.perf_counter()

    def run_to_end(self) -> dict[str, Any]:
        """Evaluates, trains, evaluates and saves; returns what `summary.json` holds."""
        if self.setup.eval_examples and not self.progress.evaluations:
            self._evaluate_before()
        self._train()
        if self.setup.eval_examples and "trained" not in self.progress.evaluations:
            # Resumed with less patience, or fewer steps, than had already passed.
            self._evaluate("trained", self.run.model, self.setup.eval_examples, "student")
        if self.config.run.save:
            self.run_dir.save_model(self.run, "model")
        summary = self.progress.summary(self.setup.counts, self.config.optim.steps, saved=self.config.run.save)
        self.run_dir.write_summary(summary)
        return summary

    def _train(self) -> None:
        options, every, progress = self.config.optim, self.config.run.checkpoint_every, self.progress
        earlier = progress.seconds
        order = batches(len(self.setup.examples), options.batch_size, self.config.run.seed, start=progress.step)
        self.run.model.train()
        if self.random_state is not None:  # last of all, since loading and trackers may draw
            checkpoint.set_random_state(self.random_state)
        with StopRequest(quiet=self.display.quiet) as stop:
            while not self.finished():
                progress.evaluations.pop("trained", None)  # of where an earlier process had ended
                record = self._one_step([self.setup.examples[i] for i in next(order)], progress.step + 1)
                progress.step += 1
                progress.tokens += record["tokens"]
                progress.last_record = record
                progress.seconds = earlier + time.perf_counter() - self.began
                self._evaluate_if_due()
                finished = self.finished()
                stop.signal = max(distributed.gathered(stop.signal))
                if stop.signal or (every and (finished or progress.step % every == 0)):
                    self.run_dir.save_checkpoint(progress.step, self._state(), keep=self.config.run.keep_checkpoints)
                if stop.signal and not finished:
                    raise Interrupted(f"stopped after step {progress.step}; {self.run_dir.what_is_safe()}", stop.signal)

    def finished(self) -> str | None:
        """As `Progress.finished`, by this run's options."""
        return self.progress.finished(self.config.optim.steps, self.config.eval.patience)

    def _one_step(self, batch: Sequence[Example], number: int) -> dict[str, Any]:
        """The step of that number, applied; returns its record, which the observers have got."""
        began, clock = time.perf_counter(), Clock(self.run.device)
        extra: dict[str, float] = {}
        if self.config.teacher.reason_first:
            with clock("reason"):
                analysed = analyse(self.run, self.setup.prompter, batch, number)
            batch = analysed.examples
            extra = {"analysis_length": analysed.mean_length, "analysis_truncated": analysed.truncated}
        result = check_step_result(self.setup.step(self.run, batch, number))
        with clock("samples"):  # by the weights that wrote and scored them
            samples = self._samples(batch, result, number)
        with clock("optimizer"):
            values, rate = self._apply(result, extra, number)
        phases = (result.clock.seconds() if result.clock else {}) | clock.seconds()
        seconds = time.perf_counter() - began
        record: dict[str, Any] = {"step": number, **values, "lr": rate, "tokens": result.tokens}
        record |= {"tokens_per_second": result.tokens / seconds, "seconds": seconds}
        record |= {f"seconds_{phase}": spent for phase, spent in phases.items()}
        record["peak_memory_bytes"] = peak_memory(self.run.device)
        record["warnings"] = self.watch.check(record)
        for observer in self.observers:
            observer.on_step(record, samples)
        return record

    def _apply(self, result: StepResult, extra: Mapping[str, float], number: int) -> tuple[dict[str, float], float]:
        """Lets the optimiser and the teacher take the step, once loss and gradient are known to be finite; returns the
        measurements on the host, and the learning rate."""
        rate = learning_rate(self.config.optim, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = distributed.full(nn.utils.clip_grad_norm_(parameters, self.config.optim.max_grad_norm or math.inf))
        values = host_values({"loss": result.loss, "grad_norm": norm, **result.metrics, **extra})
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(values[name]):
                raise NonFiniteError(
                    f"step {number}: the {what} is {values[name]}; stopped before the optimiser, so the weights "
                    f"are those after step {number - 1}; {self.run_dir.what_is_safe()}"
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.run.teacher.update(number)
        return values, rate

    def _samples(self, batch: Sequence[Example], result: StepResult, number: int) -> list[dict[str, Any]]:
        """The first rollouts of the first two prompts, token by token, at the steps that are to show some."""
        every, each = self.config.run.sample_every, self.config.rollout.per_prompt
        if not every or (number > 1 and number % every):
            return []
        return [
            {
                "step": number,
                "source": example.row.source,
                "problem": example.row.problem_text,
                "rollout": self.run.tokenizer.decode(rollout.ids),
                "tokens": len(rollout.ids),
                "truncated": rollout.truncated,
                "view": token_view(self.run, example, rollout),
            }
            for example, rollout in list(zip(batch, result.rollouts[::each], strict=False))[:2]
        ]

    def _evaluate_before(self) -> None:
        examples = self.setup.eval_examples
        self._evaluate("base", self.run.model, examples, "student")
        if self.run.teacher.source is not None and all(example.teacher for example in examples):
            if self.config.teacher.reason_first:
                examples = analyse(self.run, self.setup.prompter, examples, 0).examples
            with self.run.teacher.active() as model:
                self._evaluate("teacher", model, examples, "teacher")

    def _evaluate_if_due(self) -> None:
        """Evaluates the student after a step and keeps count of the best; `eval.keep_best` keeps its weights, too."""
        options, progress = self.config.eval, self.progress
        last = progress.step == self.config.optim.steps
        if not self.setup.eval_examples or not (last or (options.every and progress.step % options.every == 0)):
            return
        name = "trained" if last else f"step {progress.step}"
        result = self._evaluate(name, self.run.model, self.setup.eval_examples, "student")
        if not options.every:
            return
        if progress.judge(result.accuracy) and options.keep_best:
            self.run_dir.save_model(self.run, "best")
            base = progress.evaluations.get("base")
            if base is not None and result.accuracy <= base["accuracy"]:
                self.display.note("the best so far, and no better than the model before training")
        if progress.out_of_patience(options.patience) and not last:
            progress.evaluations["trained"] = asdict(result)
            best, count = progress.best or {}, progress.since_best
            evaluations = "1 evaluation was" if count == 1 else f"{count} evaluations were"
            standstill = f"no better than {best['accuracy']:.1%} at step {best['step']}"
            self.display.note(f"stopped early: {evaluations} {standstill}")

    def _evaluate(self, name: str, model: nn.Module, examples: Sequence[Example], context: Context) -> Evaluation:
        with evaluating(model), torch.no_grad():  # whatever a user's function does to it
            given = check_evaluation(self.setup.evaluate(self.run, model, examples, context))
        result = distributed.gathered(given)[0]  # scorers that watch the time may differ
        peak_memory(self.run.device)  # starts anew, so that the next step reports its own
        for observer in self.observers:
            observer.on_evaluation({"step": self.progress.step, "name": name, **asdict(result)})
        if not name.startswith("step"):
            self.progress.evaluations[name] = asdict(result)
        return result

    def _state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            "model": checkpoint.trained_state(self.run.model),
            "optimizer": self.optimizer.state_dict(),
            "teacher": self.run.teacher.state_dict(),
            "progress": asdict(self.progress),
            "watch": self.watch.state_dict(),
            "random": checkpoint.random_state(),
        }

    def restore(self, *, same_measure: bool = True) -> None:
        """Takes up the newest usable checkpoint, and takes back what was logged after it.

        `same_measure`: whether evaluations measure what they did, so that the best one so far still is.
        """
        run_dir = self.run_dir
        found = checkpoint.latest_checkpoint(run_dir.checkpoints, run_id=run_dir.run_id, warn=self.display.warn)
        if found is None:
            self.display.note("no checkpoint was finished yet: the run starts anew")
            run_dir.rewind(-1)
            return
        path, state = found
        try:
            checkpoint.load_trained_state(self.run.model, state["model"])
            self.optimizer.load_state_dict(distributed.optimizer_state(self.optimizer, state["optimizer"]))
            self.run.teacher.load_state_dict(state["teacher"])
            self.progress = Progress(**state["progress"])
            self.watch.load_state_dict(state["watch"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: does not fit this run: {error}") from error
        self.random_state = state["random"]
        if not same_measure and self.progress.best is not None:
            self.display.note("evaluations now measure something else: the count for the best one begins anew")
            self.progress.best, self.progress.since_best = None, 0
        run_dir.rewind(self.progress.step)
