"""The loop around a step: load, evaluate, train, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsd import models
from opsd.config import Config, ConfigError, OptimConfig, to_yaml
from opsd.data import DataError, Row, batches, read_rows
from opsd.evaluate import Evaluation, evaluate
from opsd.metrics import Clock, Display, append_json, host_values
from opsd.prompts import Example, Prompter, encode_rows
from opsd.step import Run, Step, opsd_step
from opsd.teachers import Teacher, make_teacher
from opsd_kernels import lm_head_of
from opsd_kernels.packing import plan_passes


class NonFiniteError(Exception):
    """The loss or its gradient is infinite or not a number. The optimiser has not used it."""


class Interrupted(Exception):
    """The user stopped the run; the message says what was kept."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves. `evaluations` holds "base", "teacher" and "trained" where there was data for them."""

    run_dir: Path
    model_dir: Path | None
    evaluations: dict[str, Evaluation]
    seconds: float
    summary: dict[str, Any]


def train(config: Config, *, step: Step = opsd_step, quiet: bool = False) -> RunResult:
    """Train as `config` says; everything written goes to the run directory.

    Args:
        config: from `opsd.config.load_config`.
        step: computes a loss on some examples and its gradients; see `opsd.step.Step`.
        quiet: print nothing.

    Raises:
        ConfigError: the run cannot start as asked (`DataError` for a row that cannot be used).
        NonFiniteError: before the optimiser would have used a non-finite loss or gradient.
        Interrupted: on Ctrl-C after the first step, once the weights are saved.
    """
    started = time.perf_counter()
    with Display(every=config.run.log_every, quiet=quiet) as display:
        run_dir = _check_run_dir(config)
        device = _device(config)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        name = Path(config.model.path).name if config.model.path else "tiny"
        if config.model.path is None:
            config = _embedded(config, display)
        rows, skipped = read_rows(config.data.train or "", skip_bad_rows=config.data.skip_bad_rows)
        eval_rows: list[Row] = []
        eval_skipped = 0
        if config.data.eval:
            required = ("problem", "answer")
            eval_rows, eval_skipped = read_rows(
                config.data.eval, required=required, skip_bad_rows=config.data.skip_bad_rows
            )
            eval_rows = eval_rows[: config.eval.max_problems]

        torch.manual_seed(config.run.seed)
        tokenizer = models.load_tokenizer(config)
        prompter = Prompter(tokenizer, config.prompts)
        limit, too_long = config.data.max_prompt_tokens, config.data.too_long
        examples, dropped = encode_rows(prompter, rows, limit=limit, too_long=too_long)
        eval_examples: list[Example] = []
        eval_dropped = 0
        if eval_rows:
            eval_examples, eval_dropped = encode_rows(prompter, eval_rows, limit=limit, too_long=too_long)
        counts = {
            "train_rows": len(examples),
            "train_rows_skipped": skipped,
            "train_rows_too_long": dropped,
            "eval_rows": len(eval_examples),
            "eval_rows_skipped": eval_skipped,
            "eval_rows_too_long": eval_dropped,
        }

        model = models.load_model(config, device)
        _check_context(config, model, [*examples, *eval_examples])
        ends = models.end_ids(model, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
        try:
            head = lm_head_of(model)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.path {config.model.path!r}: {error}") from error
        teacher = make_teacher(config.teacher.kind, model)
        packed, how = _packing(config, model, teacher)
        run = Run(config, model, tokenizer, head, teacher, device, ends, pad, packed)

        run_dir = _make_run_dir(name, run_dir)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        _introduce(run, examples[0], counts, run_dir, display)
        display.note(how)

        evaluations = {}
        if eval_examples:
            evaluations["base"] = _evaluate(run, model, eval_examples, "student", 0, "base", run_dir, display)
            if all(example.teacher for example in eval_examples):
                with run.teacher.active() as told:
                    evaluations["teacher"] = _evaluate(
                        run, told, eval_examples, "teacher", 0, "teacher", run_dir, display
                    )
        records = _loop(run, examples, eval_examples, step, run_dir, display)
        if eval_examples:
            evaluations["trained"] = _evaluate(
                run, model, eval_examples, "student", config.optim.steps, "trained", run_dir, display
            )

        model_dir = _save(run, run_dir / "model") if config.run.save else None
        seconds = time.perf_counter() - started
        summary = {
            "steps": config.optim.steps,
            "seconds": seconds,
            "tokens": sum(record["tokens"] for record in records),
            **counts,
            "evaluations": {name: asdict(evaluation) for name, evaluation in evaluations.items()},
            "last_step": records[-1],
            "model": "model" if model_dir else None,
        }
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return RunResult(run_dir, model_dir, evaluations, seconds, summary)


def _loop(
    run: Run,
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
    step: Step,
    run_dir: Path,
    display: Display,
) -> list[dict[str, Any]]:
    config, options = run.config, run.config.optim
    optimizer = make_optimizer(run.model, config)
    order = batches(len(examples), options.batch_size, config.run.seed)
    run.model.train()
    records: list[dict[str, Any]] = []
    try:
        for number in range(1, options.steps + 1):
            records.append(_one_step(run, [examples[i] for i in next(order)], step, number, optimizer, run_dir))
            last = records[-1]
            text = "  ".join(f"{k} {last[k]:.4g}" for k in ("loss", "rollout_length", "grad_norm") if k in last)
            display.advance("step", number, options.steps, f"{text}  {last['tokens_per_second']:.0f} tokens/s")
            if eval_examples and config.eval.every and number % config.eval.every == 0 and number < options.steps:
                _evaluate(run, run.model, eval_examples, "student", number, f"step {number}", run_dir, display)
    except KeyboardInterrupt:
        if not records or not config.run.save:
            raise
        kept = _save(run, run_dir / f"model-after-step-{len(records)}")
        raise Interrupted(f"stopped by the user; the weights after step {len(records)} are in {kept}") from None
    return records


def _one_step(
    run: Run, batch: Sequence[Example], step: Step, number: int, optimizer: torch.optim.Optimizer, run_dir: Path
) -> dict[str, Any]:
    """Loss, gradients, the check that both are finite, and only then the optimiser."""
    began, rate = time.perf_counter(), learning_rate(run.config.optim, number)
    for group in optimizer.param_groups:
        group["lr"] = rate
    result = step(run, batch, number)
    clock = result.clock or Clock(run.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with clock("optimizer"):
        norm = nn.utils.clip_grad_norm_(parameters, run.config.optim.max_grad_norm or math.inf)
        values = host_values({"loss": result.loss, "grad_norm": norm, **result.metrics})
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(values[name]):
                raise NonFiniteError(
                    f"step {number}: the {what} is {values[name]}; stopped before the optimiser, so the weights are "
                    f"those after step {number - 1}"
                )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    phases = {f"seconds_{phase}": seconds for phase, seconds in clock.seconds().items()}
    seconds = time.perf_counter() - began
    record = {"step": number, **values, "lr": rate, "tokens": result.tokens}
    record |= {"tokens_per_second": result.tokens / seconds, "seconds": seconds, **phases}
    if run.device.type == "cuda":
        record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(run.device)
    append_json(run_dir / "metrics.jsonl", record)
    every = run.config.run.sample_every
    if every and (number == 1 or number % every == 0):
        for example, rollout in list(zip(batch, result.rollouts, strict=False))[:2]:
            text = run.tokenizer.decode(rollout.ids)
            sample = {"step": number, "source": example.row.source, "problem": example.row.problem, "rollout": text}
            append_json(
                run_dir / "samples.jsonl", {**sample, "tokens": len(rollout.ids), "truncated": rollout.truncated}
            )
    return record


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; norms and biases, all vectors, do not decay."""
    options = config.optim
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    assert options.lr is not None  # load_config fills it in
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, betas=options.betas)


def learning_rate(options: OptimConfig, number: int) -> float:
    """The rate of step `number`, counted from 1; never 0, which would waste the step's rollouts."""
    assert options.lr is not None  # load_config fills it in
    warmup = options.warmup_steps
    if number <= warmup:
        return options.lr * number / (warmup + 1)
    done = (number - warmup - 1) / max(1, options.steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return options.lr * factor[options.schedule]


def _evaluate(
    run: Run,
    model: nn.Module,
    examples: Sequence[Example],
    context: Any,
    step: int,
    name: str,
    run_dir: Path,
    display: Display,
) -> Evaluation:
    result = evaluate(run, model, examples, context)
    display.note(f"accuracy, {name}: {result}")
    append_json(run_dir / "evaluations.jsonl", {"step": step, "name": name, **asdict(result)})
    return result


def _save(run: Run, directory: Path) -> Path:
    """The model, or its adapter, and the tokenizer, for `from_pretrained`."""
    from transformers import GenerationConfig

    lm = models.causal_lm(run.model)
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:
        # Some published models carry generation settings that load and then refuse to be saved.
        lm.generation_config = GenerationConfig(eos_token_id=run.end_ids or None, pad_token_id=run.pad_id)
    run.model.save_pretrained(directory)  # type: ignore[operator]
    run.tokenizer.save_pretrained(directory)
    return directory


def _embedded(config: Config, display: Display) -> Config:
    """`config` pointing at the embedded model and its data, made first if need be."""
    from opsd import tiny

    def on_step(step: int, total: int, loss: float) -> None:
        display.advance("preparing the embedded model", step, total, f"loss {loss:.3f}", every=max(1, total // 10))

    directory = tiny.prepare(seed=config.run.seed, on_step=on_step)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(directory / "model")),
        data=dataclasses.replace(config.data, train=str(directory / "train.jsonl"), eval=str(directory / "eval.jsonl")),
    )


def _device(config: Config) -> torch.device:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but torch finds no CUDA device; accepted here: auto, cpu")
    use_cuda = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _check_run_dir(config: Config) -> Path | None:
    if config.run.dir is None:
        return None
    directory = Path(config.run.dir)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(
            f"run.dir {config.run.dir!r} is not empty; name a new directory, a run never overwrites another"
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


def _check_context(config: Config, model: nn.Module, examples: Sequence[Example]) -> None:
    """A model run beyond its positions degrades without a word, or fails in the middle of a run."""
    limit = models.decoder_limit(model)
    new = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    longest = max(max(len(example.student), len(example.teacher)) for example in examples)
    if limit is not None and longest + new > limit:
        raise DataError(
            f"the longest prompt has {longest} tokens and rollout.max_new_tokens adds {new}, but the model has {limit} "
            "positions; lower data.max_prompt_tokens (with data.too_long drop) or rollout.max_new_tokens"
        )


def _packing(config: Config, model: nn.Module, teacher: Teacher) -> tuple[bool, str]:
    """Whether both contexts run as packed rows, and a line that says how.

    Raises ConfigError if they are to and the model does not allow it.
    """
    if config.model.packing == "off":
        return False, "scoring: padded, as asked"
    try:
        model.train()
        plan = plan_passes(model, teacher=teacher.source)
    except (TypeError, ValueError) as error:
        if config.model.packing == "on":
            raise ConfigError(f"model.packing is on, but {error}") from error
        return False, f"scoring: padded, since {error}"
    return True, f"scoring: packed, {plan.passes} ({plan.reason})"


def _introduce(run: Run, example: Example, counts: dict[str, int], run_dir: Path, display: Display) -> None:
    """What is about to happen, with the first prompts as the model reads them."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    display.note(f"run directory {run_dir}; {run.device.type}; {trained:,} of {total:,} parameters are trained")
    display.note("; ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))
    if run.config.model.dtype == "bfloat16" and not run.config.lora.enabled:
        display.note("warning: full training of bfloat16 weights loses small updates; model.dtype float32 keeps them")
    for name, ids in (("student", example.student), ("teacher", example.teacher)):
        display.note(f"--- first {name} prompt, {len(ids)} tokens ---\n{run.tokenizer.decode(ids)}")
    display.note("---")
