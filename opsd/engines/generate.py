"""The engine that is always there: transformers' `generate`, with draws that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd import distributed
from opsd.engines.decoding import Rows, decode
from opsd.errors import ConfigError, one_line
from opsd.models import autocast, causal_lm
from opsd.options import ModelConfig
from opsd.prompts import Example
from opsd.rollouts import Rollout, Sampling, derive_seed, first_end
from opsd.run import Engine, Run
from opsd.sharding import whole
from opsd.vocabulary import end_ids, pad_id, token_columns
from opsd_kernels.probe import evaluating


@dataclass(frozen=True)
class GenerateEngine:
    """Writes with `generate`, in the types of `options`.

    `end_ids`: any of these ends a rollout, which keeps the first one and nothing after it. `pad_id` fills a batch; it
    may equal an end id, or be any token: what tells padding is its position, not its id. Columns of the logits from
    `vocabulary` on are no tokens and never written; None: all are. `alone`: why prompts are continued one
    at a time, whatever is asked; None: they are not.
    """

    end_ids: Sequence[int]
    pad_id: int
    options: ModelConfig
    vocabulary: int | None = None
    alone: str | None = None
    holes: tuple[int, ...] = ()  #: ids below `vocabulary` that are no tokens either

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, options: ModelConfig) -> GenerateEngine:
        """With the end tokens of `model` and `tokenizer`, and the tokens of `tokenizer`.

        Raises:
            ConfigError: an end token has no row in the embedding.
        """
        lm = causal_lm(model)
        ends = end_ids(lm, tokenizer)
        columns = lm.get_output_embeddings().weight.shape[0]
        valid, holes = token_columns(columns, tokenizer)
        return cls(ends, pad_id(lm, tokenizer, ends), options, valid, holes=holes)

    def check(self, model: nn.Module, where: str) -> None:
        """Has `model` write two tokens, the second with its cache.

        Raises:
            ConfigError: it cannot, as its config has a value that only shows when it runs; begins with `where`.
        """
        try:
            self.write(model, [[self.pad_id]], Sampling(2, temperature=0.0), [0], 1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model's code makes of its config
            said = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"{where}: the model is loaded, but fails at its first tokens: {said}") from error

    def rollouts(self, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
        """As `opsd.run.Engine` says. Each rollout depends on run.seed, the step's number, the example's place in the
        batch and its own number, on nothing else."""
        return rollouts_by(self, run, examples, number)

    def write(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], batch: int
    ) -> list[Rollout]:
        """One rollout for each prompt, in the order of `prompts`.

        Args:
            model: used in evaluation mode and without gradients; its modes and its generation config are left as they
                were.
            prompts: token ids, padded on the left within a batch.
            seeds: one for each prompt. A rollout depends on its prompt and its seed, not on `batch`, its neighbours or
                torch's random state, which is neither used nor changed.
            batch: prompts generated together, those of similar length with each other. Several processes each write
                their share of the prompts, and all return all rollouts.

        Returns:
            Rollouts with the sampler's log-probabilities, or without (None) where `sampling.temperature` is 0.

        "Not on `batch`" holds for what is drawn; the logits themselves differ in their last bits from one batch shape
        to another. Rarely, a random number lies so close to the border between two tokens that this decides.

        Raises:
            ValueError: `seeds` and `prompts` are not equally long, or an option of `sampling` is out of range.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds must have one entry for each of {len(prompts)} prompts, got {len(seeds)}")
        lm = causal_lm(model)
        batch = 1 if self.alone else batch
        order = distributed.own(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        rollouts: dict[int, Rollout] = {}
        with (
            whole(model), autocast(self.options, lm.device), _no_generation_config(lm), evaluating(model),
            torch.no_grad(),
        ):  # fmt: skip
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                written = self._write(lm, [prompts[i] for i in chosen], sampling, [seeds[i] for i in chosen])
                rollouts |= zip(chosen, written, strict=True)
        return distributed.merged(rollouts)

    def _write(
        self, lm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """A batch of rollouts."""
        rows = Rows(len(prompts), self.end_ids, lm.device)
        sampler = _Sampler(sampling, seeds, rows) if sampling.temperature > 0 else None
        processors = LogitsProcessorList([self._tokens_alone, *([sampler] if sampler else [])])
        written = decode(lm, prompts, rows, processors, self.pad_id, sampling.max_new_tokens)
        logprobs = sampler.logprobs.tolist() if sampler else [None] * len(prompts)
        return [first_end(ids, self.end_ids, own) for ids, own in zip(written, logprobs, strict=True)]

    def scores(self, lm: Any, prompts: Sequence[Sequence[int]], forced: Sequence[int]) -> Tensor:
        """(B, T, V): the logits of `generate` from which each of the T tokens `forced` is drawn, after each of B
        `prompts` in one batch, whatever they are."""
        recorder = _Recorder(forced)
        rows = Rows(len(prompts), (), lm.device)
        with _no_generation_config(lm), torch.no_grad():
            decode(lm, prompts, rows, LogitsProcessorList([recorder]), self.pad_id, len(forced))
        return torch.stack(recorder.scores, dim=1)

    def barred(self, columns: int) -> list[int]:
        """The ids below `columns` that are no tokens, and are never written."""
        return [*self.holes, *range(columns if self.vocabulary is None else self.vocabulary, columns)]

    def _tokens_alone(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that leaves what is no token no chance."""
        if self.vocabulary is not None:
            scores[:, self.vocabulary :] = -torch.inf
        if self.holes:
            scores[:, list(self.holes)] = -torch.inf
        return scores


def rollouts_by(engine: Engine, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
    """What `opsd.run.Engine.rollouts` is to give, by `engine.write`."""
    options, seed = run.config.rollout, run.config.run.seed
    each = [(place, g) for place in range(len(examples)) for g in range(options.per_prompt)]
    prompts = [examples[place].student for place, _ in each]
    seeds = [derive_seed(seed, "rollout", number, place, g) for place, g in each]
    sampling = Sampling.by_options(options, options.max_new_tokens)
    return engine.write(run.model, prompts, sampling, seeds, options.batch_size)


class _Sampler:
    """A logits processor that samples. It leaves one token possible, which greedy decoding then has to take.

    transformers puts a caller's processors before its own temperature and cut-offs and draws after them, from torch's
    one random state, which a batch shares. So it decodes greedily, and all that happens here.

    `logprobs` (B, max_new_tokens) holds those of what it chose for each of the `rows` it began with.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], rows: Rows):
        warmth = sampling.temperature
        self.warpers: list[Any] = [] if warmth == 1 else [TemperatureLogitsWarper(float(warmth))]
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))
        # One uniform number for each (seed, position), drawn on the CPU: the same on every device.
        drawn = torch.stack([_uniforms(seed, sampling.max_new_tokens) for seed in seeds])
        self.rows, self.uniforms, self.position = rows, drawn.to(rows.numbers.device), 0
        self.logprobs = torch.zeros_like(self.uniforms, dtype=torch.float32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        logprobs = scores.log_softmax(-1)
        now = self.rows.numbers, self.position
        token = inverse_cdf(logprobs.exp(), self.uniforms[now])[:, None]
        self.logprobs[now] = logprobs.gather(1, token)[:, 0]
        self.position += 1
        return logprobs.fill_(-torch.inf).scatter_(1, token, 0.0)


class _Recorder:
    """A logits processor that keeps what it is given, and leaves the next of `forced` possible alone."""

    def __init__(self, forced: Sequence[int]):
        self.forced, self.scores = forced, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.forced[len(self.scores) - 1]] = 0.0
        return chosen


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) int64: in each row of `probabilities` (B, V) the entry where the cumulative sum passes `uniforms` (B,).

    The sum is taken over integers, in steps of 2^-60: it is then the same in whatever order a device adds, never
    falls, and an entry of probability 0 cannot be chosen. `uniforms` is float64 in [0, 1).
    """
    vocab = probabilities.shape[-1]
    steps = (probabilities * 2.0**60).long()  # exact, the factor being a power of two
    size = next((size for size in (256, 128, 64) if vocab % size == 0), 256)
    if vocab % size:
        steps = torch.nn.functional.pad(steps, (0, -vocab % size))
    blocks = steps.unflatten(-1, (-1, size))  # the block first, then the entry in it
    ends = blocks.sum(-1).cumsum(-1)
    total = ends[:, -1]
    target = torch.minimum((uniforms * total.double()).long(), total - 1)  # as the product may be rounded up
    block = torch.searchsorted(ends, target[:, None], right=True).clamp(max=ends.shape[-1] - 1)
    within = blocks.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(-1)
    target += within[:, -1] - ends.take_along_dim(block, 1)[:, 0]
    found = block[:, 0] * size + torch.searchsorted(within, target[:, None], right=True)[:, 0]
    return found.clamp(max=vocab - 1)  # out of range only for NaN, which the loss then reports


@contextmanager
def _no_generation_config(lm: Any) -> Iterator[None]:
    """While open, `lm` has no generation config of its own: `generate` fills what a call leaves unset from it, and a
    repetition penalty, say, would make the rollouts something else than samples of the model."""
    saved, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = saved
