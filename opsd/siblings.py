"""Contexts that read what is known in the step alone: other rollouts of the same prompt, other rows' problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opsd.contexts import SIBLINGS, reads_step
from opsd.data import Row
from opsd.prompts import Example, Prompter
from opsd.rewards import Rewards
from opsd.rollouts import Rollout
from opsd.run import Run


@dataclass(frozen=True)
class Readers:
    """The example of each rollout, as it is to be scored, and whether all other rollouts that it reads are there."""

    examples: list[Example]
    complete: list[bool]


def readers(
    run: Run, examples: Sequence[Example], rollouts: Sequence[Rollout], rewards: Rewards | None
) -> Readers | None:
    """The examples of a step's rollouts with what they read of the step; None where no context reads such."""
    prompter, each = run.prompter, run.config.rollout.per_prompt
    if prompter is None:
        return None
    read = [name for name in SIBLINGS if any(f"{{{name}}}" in text for text in prompter.templates.values())]
    if not read and not any(name.startswith("shuffled_") for name in prompter.contexts):
        return None
    texts = run.tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)
    found, complete = [], []
    for i in range(len(rollouts)):
        place, number = divmod(i, each)
        own = slice(place * each, (place + 1) * each)
        known = {} if rewards is None else siblings(texts[own], rewards.correct[own], number)
        following = [examples[(place + step) % len(examples)].row for step in range(1, len(examples))]
        found.append(reread(prompter, examples[place], known, following))
        complete.append(all(known.get(name) is not None for name in read))
    return Readers(found, complete)


def siblings(texts: Sequence[str], correct: Sequence[bool], number: int) -> dict[str, str | None]:
    """Of a prompt's rollouts the next right and the next wrong one after `number`, which is left out; None: there is
    none."""
    order = [(number + step) % len(texts) for step in range(1, len(texts))]
    return {
        name: next((texts[i] for i in order if correct[i] is right), None)
        for name, right in zip(SIBLINGS, (True, False), strict=True)
    }


def reread(prompter: Prompter, example: Example, known: Mapping[str, str | None], others: Sequence[Row]) -> Example:
    """`example` with what its contexts read of the step: the rollouts `known`, by the templates' names of them, and in
    shuffled_b the problem of `others[b - 1]`. A context without its rollout reads the student's prompt."""
    row, contexts = example.row, dict(example.contexts)
    for name in prompter.contexts:
        if name.startswith("shuffled_"):
            contexts[name] = prompter.with_problem_of(row, others[int(name.removeprefix("shuffled_")) - 1])
    for name, template in prompter.templates.items():
        if reads_step(template):
            named = {key: known.get(key) for key in SIBLINGS if f"{{{key}}}" in template}
            there = {key: text for key, text in named.items() if text is not None}
            contexts[name] = prompter.by_template(row, name, **there) if there == named else example.student
    return replace(example, teacher=contexts.pop("teacher", example.teacher), contexts=contexts)
