"""`teacher.reason_first`: the teacher writes an analysis of each solution before it is asked to score with it.

The analyses are made anew for each step, by the teacher as it then is, from seeds of the step alone: a run that is
resumed writes the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from opsd.prompts import Example, Prompter
from opsd.rollouts import Sampling, derive_seed
from opsd.run import Run


@dataclass(frozen=True)
class Analysed:
    """Examples whose teacher prompts hold an analysis, and what to report of the analyses."""

    examples: list[Example]
    mean_length: float
    truncated: float


def analyse(run: Run, prompter: Prompter, examples: Sequence[Example], step: int) -> Analysed:
    """Has the teacher of `run` write an analysis for each of `examples`, which must have the prompts for it.

    A row with a `teacher_prompt` of its own gets the analysis all the same.
    """
    options = run.config.rollout
    sampling = Sampling.by_options(options, run.config.teacher.reason_max_new_tokens)
    seeds = [derive_seed(run.config.run.seed, "reason", step, place) for place in range(len(examples))]
    with run.teacher.active() as model:
        written = run.engine.write(model, [e.reason for e in examples], sampling, seeds, options.batch_size)
    texts = run.tokenizer.batch_decode([w.ids for w in written], skip_special_tokens=True)
    return Analysed(
        [prompter.encode(e.row, analysis=text.strip()) for e, text in zip(examples, texts, strict=True)],
        sum(len(w.ids) for w in written) / len(written),
        sum(w.truncated for w in written) / len(written),
    )
