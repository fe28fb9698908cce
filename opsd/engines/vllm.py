"""vLLM in this process, or in each of several. It reads the student's weights anew before each step's rollouts, and on
a GPU gives its memory back when they are written.

Building it seeds the global generators, which are put back; on a CPU it also turns `torch.set_num_threads` off.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opsd import distributed
from opsd.checkpoint import random_state, set_random_state
from opsd.config import Config
from opsd.engines.generate import rollouts_by
from opsd.errors import ConfigError, one_line
from opsd.models import causal_lm, pick_device
from opsd.prompts import Example
from opsd.rollouts import Rollout, Sampling, first_end
from opsd.run import Engine, Run
from opsd.sharding import whole


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """Of the causal LM in `model`, as if it had no adapters: names and values, and the layer of LoRA that is on one."""
    lm = causal_lm(model)
    adapted = {name: module for name, module in lm.named_modules() if hasattr(module, "get_delta_weight")}
    for name, value in lm.named_parameters():
        owner, _, last = name.rpartition(".base_layer.")
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), value, adapted.get(owner) if last == "weight" else None


def trained_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters of the causal LM in `model` as they act: what adapters of LoRA that are on do
    is added to what they adapt, into a copy."""
    for name, value, layer in _parameters(model):
        for adapter in [] if layer is None or layer.disable_adapters else layer.active_adapters:
            value = value + layer.get_delta_weight(adapter).to(value.dtype)
        yield name, value.detach()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the parameters, by their names: a model of others is not one that a vLLM for this one can serve."""
    return {name: tuple(value.shape) for name, value, _ in _parameters(model)}


@dataclass(frozen=True)
class VllmEngine:
    """Has vLLM (`llm`) write: rollouts, answers, and what a teacher writes that is a model of the same shapes."""

    llm: Any
    engine: Any  #: a `GenerateEngine`, for other models
    shapes: Mapping[str, tuple[int, ...]]  #: of the models that `llm` serves
    sleeps: bool = False  #: `llm` has neither weights nor a cache between `load` and `rest`

    @property
    def end_ids(self) -> Sequence[int]:
        return self.engine.end_ids

    @classmethod
    def of(cls, config: Config, engine: Engine, model: nn.Module, longest: int) -> VllmEngine:
        """For `rollout.batch_size` sequences at once, of at most `longest` tokens, of models like `model`.

        Raises:
            ConfigError: vLLM is not installed, or cannot serve the model.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are handed over in this process
        states, sleeps = random_state(), pick_device(config.run.device).type == "cuda"
        # vLLM's own groups would else be of all processes; each has a whole model
        apart = {"distributed_executor_backend": "external_launcher"} if distributed.size() > 1 else {}
        try:
            from vllm import LLM, _custom_ops

            _custom_ops._supports_onednn = False  # which packs linear weights, so that they cannot be loaded again
            llm = LLM(
                model=str(config.model.path),
                dtype=config.model.dtype if config.model.autocast == "none" else config.model.autocast,
                trust_remote_code=config.model.trust_remote_code,
                max_model_len=longest,
                max_num_seqs=config.rollout.batch_size,
                enforce_eager=not sleeps,  # else graphs; on a CPU compiling takes a minute
                logprobs_mode="processed_logprobs",
                skip_tokenizer_init=True,
                seed=0,
                gpu_memory_utilization=config.rollout.vllm_memory,
                enable_sleep_mode=sleeps,
                **apart,
            )
        except ImportError as error:
            raise ConfigError(f"rollout.engine is vllm, which cannot be imported: {one_line(error)}") from error
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"rollout.engine is vllm, which cannot serve the model: {one_line(error)}") from error
        finally:
            set_random_state(states)
        if apart:
            distributed.closers.append(llm.llm_engine.engine_core.shutdown)  # with its groups, and ours
        made = cls(llm, engine, shapes(model), sleeps)
        made.rest()
        return made

    def rest(self) -> None:
        """Gives the device's memory back, until `load`."""
        if self.sleeps:
            self.llm.sleep(level=2)

    def load(self, model: nn.Module) -> None:
        """Gives vLLM the weights of `model`. To be called by all processes.

        Raises:
            RuntimeError: a parameter of vLLM's model is not among them, and would stay old.
        """
        tied = causal_lm(model).config.get_text_config().tie_word_embeddings

        def load(served: Any) -> list[str]:
            named = ((n, v) for n, v in trained_weights(model) if not (tied and n == "lm_head.weight"))
            own = {name for name, _ in served.named_parameters()}
            return sorted(own - set(served.load_weights(named)))

        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        with whole(model), torch.no_grad():
            old = [name for names in self.llm.apply_model(load) for name in names]
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        if old:
            raise RuntimeError(f"vLLM keeps old weights, nothing of the model goes by these names: {', '.join(old)}")
        self.llm.reset_prefix_cache()

    def rollouts(self, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
        """As `opsd.run.Engine` says, with a seed for each; other tokens than those of `GenerateEngine`."""
        return rollouts_by(self, run, examples, number)

    def write(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], batch: int
    ) -> list[Rollout]:
        """As `GenerateEngine.write`, but as many at a time as vLLM was made for."""
        if shapes(model) != self.shapes:
            return self.engine.write(model, prompts, sampling, seeds, batch)
        own = distributed.own(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        self.load(model)
        written = self.sample([prompts[i] for i in own], sampling, [seeds[i] for i in own])
        self.rest()
        return distributed.merged(dict(zip(own, written, strict=True)))

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """One rollout for each prompt and seed, by the weights loaded last."""
        from vllm import SamplingParams

        columns = self.llm.llm_engine.model_config.get_vocab_size()
        barred = dict.fromkeys(self.engine.barred(columns), -math.inf)
        asked = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                seed=seed,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(self.end_ids),
                ignore_eos=True,  # which may be another end than ours; ours are above
                logprobs=0,
                logit_bias=barred or None,
                detokenize=False,
            )
            for seed in seeds
        ]
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = []
        for answer in self.llm.generate(given, asked, use_tqdm=False):
            ids = list(answer.outputs[0].token_ids)
            known = [at[token].logprob for at, token in zip(answer.outputs[0].logprobs, ids, strict=True)]
            found.append(first_end(ids, self.end_ids, known if sampling.temperature > 0 else None))
        return found


def with_vllm(config: Config, engine: Any, model: nn.Module, longest: int) -> Any:
    """`engine`, or vLLM in front of it where `rollout.engine` says so. `longest`: tokens of the run's longest context.

    Raises:
        ConfigError: vLLM is not installed, or cannot serve the model or weights of 4 bits.
    """
    if config.rollout.engine != "vllm":
        return engine
    if config.model.load_in_4bit:
        raise ConfigError("rollout.engine is vllm with model.load_in_4bit, whose weights it cannot read; use generate")
    return VllmEngine.of(config, engine, model, longest)
