"""`opsd cache-teacher`: the student writes rollouts, the teacher scores them, and what it thought of them is kept."""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opsd.config import Config, describe, load_config
from opsd.display import Display
from opsd.errors import ConfigError, WriteError
from opsd.files import replace_file
from opsd.identity import digest_inputs
from opsd.models import autocast
from opsd.plugins import Parts
from opsd.prompts import Example
from opsd.recipes.base import columns
from opsd.recipes.batch import TopK
from opsd.rollouts import Rollout
from opsd.run import Run
from opsd.setup import Setup, set_up
from opsd.teacher_cache import MANIFEST, key_of, pack_part, part_of, vocabulary_digest, write_manifest
from opsd.top_k import TopKTeacher
from opsd_kernels import top_k_logprobs

DEFAULT_K = 64
READS = (
    "model",
    "lora",
    "data",
    "prompts",
    "rollout",
    "teacher",
    "objective.top_k",
    "objective.temperature",
    "run.seed",
)
"""Options that change what is kept."""


def add_command(commands: Any, add_sources: Callable[[Any], None], parse: Callable[[Sequence[str]], Any]) -> None:
    """The sub-command; `parse` makes (option, value) pairs of the words that are options of a run."""
    parser = commands.add_parser(
        "cache-teacher",
        help="write rollouts and the teacher's likeliest tokens to files, to train from without the teacher",
        usage="opsd cache-teacher --output DIR [--preset NAME] [--config FILE] [--section.option VALUE ...]",
        description="One or more rollouts of each row of data.train (rollout.per_prompt), by the model as it is, and "
        f"the teacher's objective.top_k likeliest tokens at each of their tokens ({DEFAULT_K} without the option). "
        "Trained from with teacher.kind cached, teacher.path DIR. The same command again goes on where it was stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe(lambda name: _is_read(name)),
        allow_abbrev=False,
    )
    add_sources(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="new directory, or one that was begun")
    parser.set_defaults(run=lambda known, rest: _run(known, parse(rest)), advice="lower optim.micro_batch_size")


def _is_read(name: str) -> bool:
    return name in READS or name.partition(".")[0] in READS


def _run(known: argparse.Namespace, overrides: Sequence[tuple[str, Any]]) -> None:
    made = cache_teacher(load_config(known.config, overrides, known.preset), Path(known.output))
    size = sum(path.stat().st_size for path in made.iterdir()) / 2**20
    print(f"teacher cache: {made}, {size:,.1f} MiB; train from it with --teacher.kind cached --teacher.path {made}")


def cache_teacher(config: Config, output: Path, *, quiet: bool = False) -> Path:
    """Writes the cache of the teacher and the rollouts that `config` describes to `output`, and returns it.

    What an earlier call with the same options had finished there is kept: rollouts depend on their seeds alone.

    Raises:
        ConfigError: a run of `config` could not start, k exceeds the vocabulary, or `output` holds something else.
        WriteError: a file cannot be written, a full disk say; what is finished stays.
    """
    if not config.model.path:
        raise ConfigError("cache-teacher needs model.path and data.train")
    if config.teacher.kind == "cached":
        raise ConfigError("teacher.kind is 'cached'; accepted by cache-teacher: base, live, ema, model, server")
    setup = set_up(config, Parts())
    run, size = setup.run, config.optim.batch_size
    vocabulary = min(columns(run.head), columns(run.teacher.head))
    k = config.objective.top_k or min(DEFAULT_K, vocabulary)
    if k > vocabulary:
        raise ConfigError(f"objective.top_k is {k}; accepted: 1 to {vocabulary}, the vocabulary")
    of = _digest(setup, k)
    _check_output(output, of)
    parts, count = list[tuple[Path, list[str]]](), len(setup.examples)
    with Display(every=1, steps=-(-count // size), quiet=quiet) as display:
        for number, start in enumerate(range(0, count, size), start=1):
            examples, path = setup.examples[start : start + size], output / f"part-{number:05d}.safetensors"
            parts.append((path, [key_of(example) for example in examples]))
            if part_of(path) != of:
                rollouts = run.engine.rollouts(run, examples, number)
                try:
                    replace_file(path, pack_part(rollouts, _scored(run, examples, rollouts, k, vocabulary), of))
                except OSError as error:
                    raise WriteError(f"--output {path} cannot be written: {error.strerror or error}") from error
            display.advance("caching the teacher", number, -(-count // size), f"{start + len(examples)} rows", every=1)
    options = {name: getattr(config.rollout, name) for name in ("per_prompt", "temperature", "max_new_tokens")}
    write_manifest(
        output,
        parts,
        k=k,
        columns=columns(run.head),
        temperature=config.objective.temperature,
        tokenizer=vocabulary_digest(run.tokenizer),
        rollouts=options,
        teacher={"kind": config.teacher.kind, "path": config.teacher.path, "student": config.model.path},
    )
    return output


def _scored(run: Run, examples: Sequence[Example], rollouts: Sequence[Rollout], k: int, vocabulary: int) -> TopK:
    """The teacher's likeliest tokens on all rollouts, a micro-batch at a time."""
    read = [example for example in examples for _ in range(run.config.rollout.per_prompt)]
    size, found = run.config.optim.micro_batch_size, []
    for start in range(0, len(rollouts), size):
        some, of = rollouts[start : start + size], read[start : start + size]
        if isinstance(run.teacher, TopKTeacher):
            found.append(run.teacher.top_k(of, some))
            continue
        with torch.no_grad(), autocast(run.config.model, run.device):
            hidden = run.teacher.hidden([example.teacher for example in of], [rollout.ids for rollout in some])
            head = run.teacher.head
            options = {**head.options(), "valid_vocab": vocabulary, "temperature": run.config.objective.temperature}
            logprobs, ids, _ = top_k_logprobs(hidden, head.weight, k, **options)
            found.append(TopK(ids.cpu(), logprobs.float().cpu()))
    return TopK(torch.cat([one.ids.cpu() for one in found]), torch.cat([one.logprobs.cpu() for one in found]))


def _digest(setup: Setup, k: int) -> str:
    options = {name: value for name, value in setup.run.config.options().items() if _is_read(name)}
    size = setup.run.config.optim.batch_size
    described = json.dumps([options, digest_inputs(setup), k, size], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:20]


def _check_output(output: Path, of: str) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {str(output)!r} is a file; accepted: a new directory")
    try:
        output.mkdir(parents=True, exist_ok=True)
        there = sorted(output.iterdir())
    except OSError as error:
        raise ConfigError(f"--output {str(output)!r} cannot be made: {error.strerror}") from error
    for path in there:
        if path.name == MANIFEST:
            raise ConfigError(f"--output {str(output)!r} holds a finished cache, which is never overwritten")
        if not path.name.startswith(".") and part_of(path) != of:
            raise ConfigError(f"--output {str(output)!r} holds {path.name}, which is not of this cache; name another")
