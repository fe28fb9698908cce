"""`opsd eval`: a model's directory and a file of problems in, an evaluation and all its answers out."""

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from opsd import models
from opsd.batching import tried_engine, writing_note
from opsd.config import Config, load_config, yaml_options
from opsd.engines import GenerateEngine
from opsd.errors import ConfigError, Undecided, WriteError
from opsd.evaluation import Answer, Context, Evaluation, Evaluator, check_examples, summarise
from opsd.files import replace_file
from opsd.prompts import Prompter, read_examples
from opsd.run_dir import read_description
from opsd.scorers import scorer_of
from opsd.vocabulary import check_prompts

# The options that change an evaluation, a whole section or one option, and those of the sections that do not.
USED = {"model", "data", "prompts", "rollout.max_new_tokens", "eval", "run.seed", "run.device", "run.threads"}
UNUSED = {
    "model.packing",
    "model.gradient_checkpointing",
    "data.train",
    "prompts.reason",
    "prompts.analysis",
    "eval.every",
    "eval.keep_best",
    "eval.patience",
}
# Those whose defaults a run's own model takes from its run, so that its evaluation is the run's own. Whether code is
# trusted is not among them: the run may be another's.
FROM_RUN = {"prompts", "rollout", "eval", "model.dtype", "model.autocast", "model.attn_implementation", "run.seed"}


@dataclass(frozen=True)
class Report:
    """What `opsd eval` found: the numbers, every answer, and what they were made of."""

    evaluation: Evaluation
    answers: list[Answer]
    config: Config
    context: Context
    rows_skipped: int
    rows_too_long: int
    seconds: float
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """Everything but the answers, for JSON."""
        options: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in self.config.options().items():
            if is_used(name):
                section, _, option = name.partition(".")
                options[section][option] = value
        return {
            "model": self.config.model.path,
            "data": self.config.data.eval,
            "context": self.context,
            **asdict(self.evaluation),
            "rows_skipped": self.rows_skipped,
            "rows_too_long": self.rows_too_long,
            "seconds": self.seconds,
            "options": options,
        }

    def write(self, output: Path) -> Path:
        """The summary to `output`, the answers, one to a line, beside it; returns the path of the answers.

        Raises:
            WriteError: one of them cannot be written (a full disk, say), of which then nothing is left.
        """
        path = answers_path(output)
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in self.answers)
        summary = json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n"
        for file, content in ((path, "".join(lines)), (output, summary)):
            try:
                replace_file(file, content)
            except OSError as error:
                raise WriteError(f"--output {file} cannot be written: {error.strerror or error}") from error
        return path


def answers_path(output: Path) -> Path:
    """Where the answers of the summary `output` go: eval.json has eval.answers.jsonl."""
    return output.with_suffix(".answers.jsonl")


def check_output(output: Path) -> None:
    """Makes the directory of the summary `output`, and tries to write there.

    Raises:
        ConfigError: it cannot be made or written, or the summary or its answers are there already.
    """
    if not output.name or os.path.isdir(output):
        raise ConfigError(f"--output {output} is a directory; name a new file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: the directory cannot be made: {error.strerror}") from error
    for path in (output, answers_path(output)):
        try:
            path.open("x").close()
            path.unlink()
        except FileExistsError:
            advice = "name a new file, an evaluation never overwrites another"
            raise ConfigError(f"--output {path} exists; {advice}") from None
        except OSError as error:
            raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error


def is_used(name: str) -> bool:
    """Whether the option `name` (dotted) can change an evaluation."""
    return _within(name, USED) and not _within(name, UNUSED)


def _within(name: str, names: set[str]) -> bool:
    return name in names or name.partition(".")[0] in names


def evaluation_config(
    model: str | None, data: str | None, path: str | Path | None = None, overrides: Sequence[tuple[str, Any]] = ()
) -> tuple[Config, str | None]:
    """The configuration that evaluates `model` on `data`, and a line that says where its defaults are from.

    If `model` is a directory with a run's config.yaml above it, the prompts, the lengths, the options of `eval`, the
    model's types and the seed default to that run's, and a date in the prompts is that of the run. A YAML file `path`
    goes before those, and `overrides` before all. Of a YAML file, what concerns training alone is passed over.

    Raises:
        ConfigError: model or data is missing, an option is unusable or would change nothing.
    """
    for name, _ in overrides:
        if not is_used(name.replace("-", "_")):
            raise ConfigError(f"{name} changes nothing in an evaluation; it is an option of opsd train")
    words = [("model.path", model), ("data.eval", data)]
    # The file is read once, since it may be a pipe.
    given = [*yaml_options(path), *overrides, *((name, value) for name, value in words if value is not None)]
    named = {name.replace("-", "_"): value for name, value in given}
    # Normalised, so that "." has the directory above it too.
    of_run = Path(os.path.normpath(Path(str(named.get("model.path"))) / ".." / "config.yaml"))
    below: list[tuple[str, Any]] = []
    if named.get("model.path") and of_run.is_file():
        try:
            options = yaml_options(of_run)
        except ConfigError as error:  # another program's
            config = load_config(None, given, training=False)
            return config, f"defaults of opsd, since above the model is no run: {error}"
        below = [(name, value) for name, value in options if _within(name, FROM_RUN) and is_used(name)]
    config = load_config(None, given, training=False, below=below)
    if not below:
        return config, None
    # Those that are the defaults anyway, or that the user gave, need not be named.
    plain = Config().options()
    taken = {name: repr(value) for name, value in below if name not in named and value != plain.get(name)}
    shown = [f"{name} {text if len(text) <= 50 else f'{text[:46]} ...'}" for name, text in taken.items()]
    return config, f"defaults from {of_run}: {', '.join(shown) or 'as opsd has them'}"


def _began(model: str | None) -> datetime | None:
    """When the run began that wrote `model`, whose prompts hold that date; None for a model of no run."""
    with contextlib.suppress(ConfigError):
        return datetime.fromisoformat(read_description(Path(os.path.normpath(Path(str(model)) / "..")))["created"])
    return None


def evaluate_model(config: Config, context: Context = "student") -> Report:
    """Load `model.path`, a model or an adapter, and evaluate it on `data.eval`. `config` is from `evaluation_config`.

    Raises:
        ConfigError: the scorer, the model or the device cannot be had (`DataError` for a row that cannot be used).
    """
    began = time.perf_counter()
    device = models.pick_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    scorer = scorer_of(config.eval)
    tokenizer = models.load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    prompter = Prompter(tokenizer, config.prompts, _began(config.model.path))
    most = config.eval.max_problems
    data = read_examples(config.data, prompter, config.data.eval or "", required=("problem", "answer"), most=most)
    examples = data.examples
    with contextlib.suppress(Undecided):
        scorer("", examples[0].row)  # a fault of the scorer should show now, not after all the answers
    check_examples(examples, context)
    model = models.load_trained(config.model, config.model.path, device)
    name = "eval.max_new_tokens" if config.eval.max_new_tokens else "rollout.max_new_tokens"
    new = config.eval.max_new_tokens or config.rollout.max_new_tokens
    longest = models.check_positions(model, [getattr(example, context) for example in examples], {name: new})
    check_prompts(models.causal_lm(model), tokenizer, examples)
    engine = GenerateEngine.of(model, tokenizer, config.model)
    engine.check(model, f"model.path {config.model.path!r}")
    engine = tried_engine(engine, longest, model)
    evaluator = Evaluator.of(config.eval, new, config.run.seed, tokenizer, engine, scorer)
    answers = evaluator.answers(model, examples, context)
    evaluation = summarise(answers, config.eval.samples)
    seconds = time.perf_counter() - began
    return Report(
        evaluation, answers, config, context, len(data.skipped), len(data.too_long), seconds, writing_note(engine)
    )
