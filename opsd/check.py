"""`opsd check`: all that the set-up of a run finds, without the run: what each part is, what is wrong or needed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from opsd import models
from opsd.batching import Scoring, writing_note
from opsd.config import Config
from opsd.data import columns_used
from opsd.engines import GenerateEngine
from opsd.errors import ConfigError
from opsd.memory import memory_of
from opsd.model_path import hub_notes
from opsd.plugins import Parts
from opsd.prompts import Encoded, decoded
from opsd.run_dir import check_new
from opsd.setup import Setup, absolute_paths, set_up
from opsd.trackers import check_trackers
from opsd.vocabulary import embedding_rows, token_columns

MISSING: Any = object()
"""In place of a part that cannot be made."""


class Collector:
    """Goes on where a part of a set-up cannot be made, with those that need no missing one; `Attempt` in `setup`."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}
        self.problems: list[str] = []

    def __call__(self, name: str, make: Callable[..., Any], /, *given: Any) -> Any:
        made = MISSING
        if not any(one is MISSING for one in given):
            try:
                made = make(*given)
            except ConfigError as error:
                self.problems += [str(error)] if str(error) not in self.problems else []
        self.made[name] = made
        return made


def check(config: Config, show: Callable[[str], None]) -> list[str]:
    """Sets up the run of `config` as `opsd.train` would, and shows what it would work with, line by line.

    Nothing is trained, and nothing is written.

    Returns:
        Every error that can be found without mending another one; the first is what `opsd.train` would raise.

    Raises:
        ConfigError: there is no model.path.
    """
    if config.model.path is None:
        raise ConfigError("opsd check needs model.path and data.train: the embedded set-up is made by opsd train")
    config, attempt = absolute_paths(config), Collector()
    attempt("directory", check_new, config.run.dir)
    attempt("trackers", check_trackers, config.run.trackers)
    for note in hub_notes(config.model.path, config.teacher.path):
        show(note)
    setup: Setup = set_up(config, Parts(), attempt=attempt)
    sections: tuple[tuple[Any, ...], ...] = (
        (_model, "model"),
        (_lora, "model"),
        (_tokenizer, "tokenizer"),
        (_vocabulary, "tokenizer", "model"),
        (_data, "train"),
        (partial(_data, name="eval"), "eval"),
        (_prompts, "tokenizer", "train"),
        (_scoring, "scoring", "model"),
        (_writing, "writing"),
    )
    for section, *needed in sections:
        given = [attempt.made.get(name, MISSING) for name in needed]
        if not any(one is MISSING for one in given):
            for line in section(config, *given):
                show(line)
    if setup is not MISSING:
        for line in (*_memory(setup), *(f"warning: {warning}" for warning in setup.warnings)):
            show(line)
    return attempt.problems


def _model(config: Config, model: nn.Module) -> Iterator[str]:
    lm, every = models.causal_lm(model), list(model.parameters())
    types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in every}))
    computed = "" if config.model.autocast == "none" else f", computed in {config.model.autocast}"
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    head = "tied to the embedding" if tied else "of its own weights"
    yield f"model: {type(lm).__name__} of {config.model.path}, {every[0].device.type}, {types}{computed}, head {head}"
    total, trained = (sum(p.numel() for p in some) for some in (every, filter(lambda p: p.requires_grad, every)))
    yield f"parameters: {total:,}, of which {trained:,} are trained"


def _lora(config: Config, model: Any) -> Iterator[str]:
    if config.lora.enabled:
        names = model.base_model.targeted_module_names
        each = ", ".join(f"{name} {count}" for name, count in Counter(n.rpartition(".")[2] for n in names).items())
        yield f"LoRA: {len(names)} modules ({each}), r {config.lora.r}, alpha {config.lora.alpha}"


def _tokenizer(config: Config, tokenizer: Any) -> Iterator[str]:
    names = {"pad": tokenizer.pad_token_id, "end": tokenizer.eos_token_id, "beginning": tokenizer.bos_token_id}
    ids = (f"{n} {'none' if i is None else f'{i} {tokenizer.convert_ids_to_tokens(i)!r}'}" for n, i in names.items())
    template = "with" if getattr(tokenizer, "chat_template", None) else "without"
    yield f"tokenizer: {type(tokenizer).__name__}, {template} a chat template; {', '.join(ids)}"


def _vocabulary(config: Config, tokenizer: Any, model: nn.Module) -> Iterator[str]:
    lm = models.causal_lm(model)
    columns, rows = lm.get_output_embeddings().weight.shape[0], embedding_rows(lm)
    valid, gaps = token_columns(columns, tokenizer)
    masked = f"ids {valid} to {columns - 1} are no tokens and masked" if valid < columns else "none masked"
    masked += f"; {len(gaps)} ids between have no token ({gaps[0]} first) and are masked too" if gaps else ""
    yield f"vocabulary: {len(tokenizer.get_vocab())} tokens; embedding of {rows} rows, head of {columns}, {masked}"


def _data(config: Config, encoded: Encoded, name: str = "train") -> Iterator[str]:
    examples = encoded.examples
    left_out = f"{len(encoded.skipped)} skipped, {len(encoded.too_long)} too long"
    used = ", ".join(columns_used([example.row for example in examples], config.data.columns))
    yield f"data.{name}: {len(examples)} rows, {left_out}; columns {used}"
    for who in ("student", "teacher", *examples[0].contexts):
        lengths = [len(ids) for e in examples if (ids := e.student if who == "student" else e.read_as(who))]
        if lengths:
            spread = f"min {min(lengths)}, median {median(lengths):g}, max {max(lengths)}"
            yield f"  {who}'s prompts: {spread} tokens (data.max_prompt_tokens {config.data.max_prompt_tokens})"


def _prompts(config: Config, tokenizer: Any, encoded: Encoded) -> Iterable[str]:
    return decoded(tokenizer, encoded.examples[0])


def _scoring(config: Config, scoring: Scoring, model: nn.Module) -> Iterator[str]:
    how = scoring.how
    yield how if scoring.packed else f"{how}; attention {models.causal_lm(model).config._attn_implementation}"


def _writing(config: Config, engine: GenerateEngine) -> list[str]:
    return writing_note(engine)


def _memory(setup: Setup) -> Iterator[str]:
    run, memory = setup.run, memory_of(setup)
    yield f"memory of a step, estimated: {_size(memory.peak)} at its peak"
    yield f"  weights {_size(memory.weights)}, the teacher's own among them; AdamW {_size(memory.optimizer)}"
    yield f"  scoring: gradients {_size(memory.gradients)}; workspace of the loss at most {_size(memory.workspace)};"
    kept = memory.kept
    yield (
        f"    activations {_size(memory.activations)}: {_size(kept.prompt)} for each of {memory.prompt_rows:,} rows of "
        f"prompts, {_size(kept.rollout)} for each of {memory.rollout_rows:,} of rollouts, {_size(kept.fixed)} besides,"
    )
    yield "    as measured on a few tokens; the rows are optim.micro_batch_size rollouts after the longest prompt"
    yield f"  writing, by when the gradients are gone: keys and values {_size(memory.cache)}"
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(run.device)
        yield f"  free on the GPU, beside the weights: {_size(free)} of {_size(total)}"


def _size(count: float) -> str:
    power = next((p for p in (3, 2, 1) if count >= 1024**p), 0)
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
