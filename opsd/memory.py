"""The memory of a step, estimated before the first: tensors that are there are counted, what passes keep is tried."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opsd import models
from opsd.objective import supplied
from opsd.prompts import Example
from opsd.recipes.batch import TopK
from opsd.rollouts import Rollout
from opsd.run import MicroBatch, Run
from opsd.scoring import rollout_index, score
from opsd.setup import Setup
from opsd.top_k import TopKTeacher
from opsd_kernels.probe import evaluating
from opsd_kernels.workspace import budget_bytes


class Kept(NamedTuple):
    """Bytes that scoring keeps for the backward pass."""

    prompt: float  #: of each of the student's rows of a prompt
    rollout: float  #: of each row of a rollout, which the head reads, too
    fixed: float  #: whatever the rows: casts of weights, the gradient of a trained head


@dataclass(frozen=True)
class Memory:
    """An estimate of what a step needs at most, in bytes."""

    weights: int  #: the teacher's own among them
    gradients: int
    optimizer: int
    kept: Kept
    prompt_rows: int  #: of the student, in the largest micro-batch
    rollout_rows: int
    workspace: int
    cache: int  #: keys and values while rollouts, or answers of an evaluation, are written

    @property
    def activations(self) -> int:
        return int(self.kept.prompt * self.prompt_rows + self.kept.rollout * self.rollout_rows + self.kept.fixed)

    @property
    def peak(self) -> int:
        """Gradients are there while a step is scored, and gone when it writes."""
        scoring = self.gradients + self.activations + self.workspace
        return self.weights + self.optimizer + max(scoring, self.cache)


def memory_of(setup: Setup) -> Memory:
    """The estimate for `setup`: what is there is counted, and what passes keep is measured on a few tokens."""
    run, config, example = setup.run, setup.run.config, setup.examples[0]
    new, rollouts = config.rollout.max_new_tokens, config.optim.batch_size * config.rollout.per_prompt
    count = min(config.optim.micro_batch_size, rollouts)
    longest, evaluated = (
        max((len(e.student) for e in some), default=0) for some in (setup.examples, setup.eval_examples)
    )
    written = min(config.rollout.batch_size, rollouts) * (longest + new)
    if evaluated:
        answers = min(config.eval.batch_size, len(setup.eval_examples) * config.eval.samples)
        written = max(written, answers * (evaluated + (config.eval.max_new_tokens or new)))
    cache = int(_cached(run, example) * written)
    run.model.train()  # as the loop has it
    kept = _kept(run, example)
    if config.model.gradient_checkpointing:  # going backward, one layer at a time is computed again
        with evaluating(run.model):
            every = _kept(replace(run, joint=False), example)  # no layer of one pass would be left out
        layers = models.causal_lm(run.model).config.get_text_config().num_hidden_layers
        kept = Kept(kept.prompt + every.prompt / layers, kept.rollout + every.rollout / layers, kept.fixed)
    gradients = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    return Memory(
        weights=sum(_storages(run).values()),
        gradients=gradients,
        optimizer=2 * gradients,  # AdamW has two averages in the type of the weights
        kept=kept,
        prompt_rows=(-(-count // config.rollout.per_prompt) if run.packed else count) * longest,
        rollout_rows=count * new,
        workspace=budget_bytes(run.device, getattr(run.recipe, "workspace_bytes", None)),
        cache=cache,
    )


@torch.no_grad()
def _cached(run: Run, example: Example) -> float:
    """Bytes of a token's keys and values; 0 for a model that has none."""
    ids = torch.tensor([example.student], device=run.device)
    with evaluating(run.model), models.autocast(run.config.model, run.device):
        found = models.body(run.model)(input_ids=ids, use_cache=True)
    layers = getattr(getattr(found, "past_key_values", None), "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor)) / len(example.student)


def _storages(run: Run) -> dict[int, int]:
    """The bytes of all that lies in memory through a step, by address."""
    source = run.teacher.source
    owners = [run.model, *([source] if isinstance(source, nn.Module) else [])]
    tensors: list[Tensor] = [t for owner in owners for t in (*owner.parameters(), *owner.buffers())]
    storages = [t.untyped_storage() for t in (*tensors, *run.teacher.state_dict().values())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _kept(run: Run, example: Example, few: int = 16) -> Kept:
    """Found from what is kept of a few tokens, of more in the prompt, and of more in the rollout."""
    least, longer, more = (_saved(run, example, few * p, few * n) for p, n in ((1, 1), (2, 1), (1, 2)))
    return Kept((longer - least) / few, (more - least) / few, max(0, 3 * least - longer - more))


def _saved(run: Run, example: Example, prompt: int, new: int) -> int:
    """Bytes that scoring a rollout of `new` tokens after `prompt` tokens keeps for the backward pass, weights aside."""
    if isinstance(run.teacher, TopKTeacher):
        run = replace(run, teacher=run.teacher.unasked())
    weights, held = _storages(run), dict[int, tuple[int, Tensor]]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that its address is not used again
        return tensor

    read, ids = ((example.student * count)[:count] for count in (prompt, new))
    short = {name: prompt_ids[:2] for name, prompt_ids in example.contexts.items()}
    targets, sequences = rollout_index([ids], run.device)
    batch = MicroBatch(
        target_ids=targets,
        sequence_ids=sequences,
        **supplied(torch.zeros(new, device=run.device), run.recipe.contexts),
        examples=[replace(example, student=read, teacher=example.teacher[:2], contexts=short)],
        rollouts=[Rollout(ids, False)],
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student, teachers = score(run, batch)
        with models.autocast(run.config.model, run.device):
            run.recipe.loss(student, teachers, batch, new)
    for stream in (student, *teachers.values()):
        pack(stream.logprobs if isinstance(stream, TopK) else stream.hidden)
    return sum(size for size, _ in held.values())
