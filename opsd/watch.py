"""Warnings while a run trains: a measurement has left its sane band, why that matters and what to change.

`Watch` reads the records of `metrics.jsonl` one by one. It does no I/O and its state is a small dict, so that a resumed
run warns exactly where an uninterrupted one would have.
"""

import copy
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from opsd.config import Config
from opsd.options import RunConfig


class Limit(NamedTuple):
    """A bound of a sane band, and why it lies there."""

    value: float
    why: str


LIMITS: dict[str, Limit] = {
    "entropy_share": Limit(0.1, "losing nine tenths of the early entropy is more than sharpening towards a teacher"),
    "entropy_of_teacher": Limit(0.5, "a student as sure as its teacher has learnt, one far surer has collapsed"),
    "entropy_floor": Limit(
        1e-3, "nats; practically one possible rollout for each prompt, so nothing new to learn from"
    ),
    "entropy_growth": Limit(3.0, "distillation sharpens or keeps; three times the entropy is text falling apart"),
    "entropy_of_note": Limit(0.1, "nats; below it even a threefold entropy is that of a confident model"),
    "truncated": Limit(0.5, "the signal at the end of an answer is missing from most rollouts"),
    "length_share": Limit(0.3, "shorter answers are common in self-distillation, losing two thirds is not"),
    "length_of_limit": Limit(0.95, "the mean can only be this close to the limit if nearly all rollouts end at it"),
    "touched": Limit(0.5, "a clip is for outliers; one that touches most tokens is another objective"),
    "clipped_away": Limit(0.5, "most of the teacher's signal is then discarded"),
    "divergence": Limit(1e-4, "nats; the rounding of bfloat16 alone gives about that"),
    "mismatch": Limit(0.1, "nats per token; other kernels or types give about a tenth of it, other weights far more"),
    "capped": Limit(0.1, "of two samplers that agree, hardly any token is off by a factor above 1"),
    "gradient": Limit(10.0, "times the median; norms within a run vary by a factor of about three"),
    "slow": Limit(
        5.0, "times the median for as much work; steps vary by a tenth, one that waits for a core by tenfold"
    ),
}

BASELINE_STEPS = 5  #: whose mean is the baseline; what needs one is judged from the step after them
RECENT = 20  #: steps whose median a gradient norm is compared with
RECOVERED = 5  #: steps within the band after which leaving it again is news; fewer, and a hovering value would nag
AGAIN = 50  #: steps after which what has not recovered is said again
PACE = 10  #: steps whose median a step's time is compared with
SLOW, AMONG = 3, 20  #: slow steps, and among how many: fewer are a machine's own affairs, or the first use of something

_PASSES = ("score", "teacher", "student", "loss", "backward", "optimizer")
"""Phases that this process alone computes. Not the rollouts: their sampler may be elsewhere."""
_WORK = ("tokens", "rollout_length_max", "teacher_context_length")
"""What may make the passes longer: packed ones grow with tokens and prompts, padded ones with the longest rollout."""
_BASELINES = ("student_entropy", "teacher_entropy", "rollout_length")

Found = Iterator[tuple[str, str]]
"""What is outside its band: its kind and a text for people."""


class Watch:
    """Judges the records of a run: `for text in watch.check(record): ...`.

    Args:
        config: of the run; says which clips are on, how long a rollout may be, and what to advise.
    """

    def __init__(self, config: Config):
        self._config = config
        self._shares_cpu = _on_cpu(config.run) and (config.run.threads or torch.get_num_threads()) > 1
        self._state: dict[str, Any] = {
            "steps": 0,
            "early": {},  # name: [count, sum]
            "norms": [],
            "times": [],  # of the last steps: seconds of the passes, then how much of each of _WORK
            "slow": [],  # the last slow steps
            "no_divergence": 0,  # steps without one since the start; -1 once there was one
            "said": {},  # kind: step
            "inside": {},  # kind: steps in a row within the band since it was said
        }

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, of what JSON can hold exactly."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the `Watch` that gave `state` was.

        Raises:
            ValueError: `state` is not one of `state_dict`.
        """
        if set(state) != set(self._state):
            raise ValueError(f"state has {sorted(state)}; accepted: {sorted(self._state)}")
        self._state = copy.deepcopy(dict(state))

    def check(self, record: Mapping[str, Any]) -> list[str]:
        """The warnings after one more step, each a line with its reason and advice; usually none.

        Args:
            record: as in `metrics.jsonl`. Values that are absent, null or not finite are not judged.
        """
        state = self._state
        values = {name: float(value) for name, value in record.items() if _is_finite(value)}
        state["steps"] += 1
        rules = (
            self._entropy,
            self._length,
            self._clips,
            self._no_divergence,
            self._sampler,
            self._gradient,
            self._slow,
        )
        found = dict(each for rule in rules for each in rule(values))
        self._remember(values)
        news = []
        for kind in found:
            last = state["said"].get(kind)
            if last is None or state["inside"][kind] >= RECOVERED or state["steps"] - last >= AGAIN:
                news.append(kind)
                state["said"][kind] = state["steps"]
            state["inside"][kind] = 0
        for kind in state["said"].keys() - found.keys():
            state["inside"][kind] = min(RECOVERED, state["inside"][kind] + 1)
        return [found[kind] for kind in news]

    def _baseline(self, name: str) -> float | None:
        """The early mean of `name`, once it is known."""
        count, total = self._state["early"].get(name, (0, 0.0))
        return total / count if count == BASELINE_STEPS else None

    def _remember(self, values: Mapping[str, float]) -> None:
        for name in _BASELINES:
            count, total = self._state["early"].get(name, (0, 0.0))
            if name in values and count < BASELINE_STEPS:
                self._state["early"][name] = [count + 1, total + values[name]]
        if "grad_norm" in values:
            self._state["norms"] = [*self._state["norms"], values["grad_norm"]][-RECENT:]
        if (times := _times(values)) is not None:
            self._state["times"] = [*self._state["times"], times][-PACE:]

    def _entropy(self, values: Mapping[str, float]) -> Found:
        entropy, early = values.get("student_entropy"), self._baseline("student_entropy")
        floor = LIMITS["entropy_floor"].value
        advice = "lower optim.lr, move objective.beta towards 0, or stop at an earlier checkpoint"
        if entropy is not None and entropy < floor:
            why = f"student entropy is {entropy:.2g} nats, below {floor:g}: its rollouts no longer vary"
            yield "entropy_low", f"{why}; {advice}"
            return
        if entropy is None or early is None:
            return
        # A teacher that shares the student's weights collapses with it, so it only counts as it was at first.
        shared = self._config.teacher.kind in ("live", "ema")
        teacher = self._baseline("teacher_entropy") if shared else values.get("teacher_entropy")
        surer = teacher is None or entropy < LIMITS["entropy_of_teacher"].value * teacher
        if entropy < LIMITS["entropy_share"].value * early and surer:
            than = f"from {early:.3g} at first" + ("" if teacher is None else f" and the teacher's {teacher:.3g}")
            why = f"student entropy has collapsed to {entropy:.3g} nats, {than}: rollouts lose their variety"
            yield "entropy_low", f"{why}; {advice}"
        elif entropy > max(LIMITS["entropy_growth"].value * early, LIMITS["entropy_of_note"].value):
            why = f"student entropy has grown to {entropy:.3g} nats, from {early:.3g} at first: its text"
            yield (
                "entropy_high",
                f"{why} may be falling apart; read samples.jsonl, lower optim.lr or use a frozen teacher",
            )

    def _length(self, values: Mapping[str, float]) -> Found:
        limit, early = self._config.rollout.max_new_tokens, self._baseline("rollout_length")
        length, truncated = values.get("rollout_length"), values.get("truncated")
        if truncated is not None and truncated > LIMITS["truncated"].value:
            why = f"{truncated:.0%} of the rollouts are cut at {limit} tokens: the teacher judges unfinished text"
            yield "truncated", f"{why} and endings are not learnt; raise rollout.max_new_tokens"
        elif length is not None and length > LIMITS["length_of_limit"].value * limit:
            why = f"rollouts are {length:.4g} tokens long on average, at the limit of {limit}: any longer"
            yield "length_limit", f"{why} and they are cut; raise rollout.max_new_tokens"
        if length is not None and early is not None and length < LIMITS["length_share"].value * early:
            why = f"rollouts have shrunk to {length:.4g} tokens on average, from {early:.4g} at first: the student"
            advice = "read samples.jsonl, lower optim.lr, or have prompts.teacher ask for the work"
            yield "length_low", f"{why} may answer without its work; {advice}"

    def _clips(self, values: Mapping[str, float]) -> Found:
        options = self._config.objective
        for kind in ("entry", "token"):
            share, clip = values.get(f"{kind}_clipped"), getattr(options, f"{kind}_clip")
            if share is not None and share > LIMITS["touched"].value:
                why = f"the {kind} clip touches {share:.0%} of the tokens: it shapes the loss instead of bounding its"
                yield f"{kind}_clip", f"{why} outliers; raise objective.{kind}_clip (now {clip})"
        divergence, amount = values.get("divergence", 0.0), values.get("clipped_amount", 0.0)
        if divergence > LIMITS["divergence"].value and amount > LIMITS["clipped_away"].value * divergence:
            clips = [f"objective.{name}" for name in ("entry_clip", "token_clip") if getattr(options, name) is not None]
            why = f"clipping removes {amount / divergence:.0%} of the divergence: most of what the teacher says is lost"
            yield "clipped_away", f"{why}; raise {' or '.join(clips) or 'the clip'}"

    def _no_divergence(self, values: Mapping[str, float]) -> Found:
        """Only from the start: a divergence that vanishes later is what training is for."""
        divergence, state = values.get("divergence"), self._state
        if divergence is None:
            return
        if state["no_divergence"] >= 0:
            none = abs(divergence) < LIMITS["divergence"].value
            state["no_divergence"] = state["no_divergence"] + 1 if none else -1
        if state["no_divergence"] >= BASELINE_STEPS:
            why = f"divergence has been about 0 from the start ({divergence:.2g} nats): the teacher equals the student"
            advice = "compare the two prompts printed at the start"
            yield "no_divergence", f"{why}, its privileged context has no effect; {advice}"

    def _sampler(self, values: Mapping[str, float]) -> Found:
        mismatch, capped = values.get("sampler_mismatch"), values.get("importance_capped")
        rollout = self._config.rollout
        cap = rollout.importance_cap
        check = "check weights, types and sampling options of the sampler"
        why = f"they were not drawn from the student as it is scored; {check}"
        # Cut-offs alone make tokens likelier for the sampler than for the student, by more than the limit.
        cut = rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0
        if mismatch is not None and not cut and abs(mismatch) > LIMITS["mismatch"].value:
            advice = "" if cap is not None else ", or weight them with rollout.importance_cap"
            apart = f"sampler and student differ by {mismatch:.3g} nats a token on the rollouts"
            yield "mismatch", f"{apart}: {why}{advice}"
        # A cap of 1 or less also holds back tokens of a sampler that agrees perfectly.
        if capped is not None and (cap is None or cap > 1) and capped > LIMITS["capped"].value:
            yield "capped", f"{capped:.0%} of the importance weights are at the cap: {why}"

    def _gradient(self, values: Mapping[str, float]) -> Found:
        norm, norms = values.get("grad_norm"), self._state["norms"]
        if norm is None or len(norms) < BASELINE_STEPS:
            return
        usual, clip = statistics.median(norms), self._config.optim.max_grad_norm
        if 0 < usual < norm / LIMITS["gradient"].value:
            used = "" if clip is None or norm <= clip else f" (clipped to {clip:g})"
            times = f"{norm / usual:.0f} times its recent median {usual:.3g}"
            advice = "set optim.max_grad_norm" if clip is None else "lower optim.lr"
            why = f"gradient norm {norm:.3g}{used} is {times}: an unusual batch or the onset of instability"
            yield "gradient", f"{why}; if it recurs, {advice}"

    def _slow(self, values: Mapping[str, float]) -> Found:
        """Threads that wait for each other, as they do once one has lost its core; said once, as it is no matter of the
        training."""
        state, times = self._state, _times(values)
        if (
            not self._shares_cpu
            or times is None
            or len(state["times"]) < BASELINE_STEPS
            or "shared_cpu" in state["said"]
        ):
            return
        # relative to the recent steps; 0 for what these had none of
        usual = [statistics.median(column) for column in zip(*state["times"], strict=True)]
        seconds, *work = (now / before if before else 0.0 for now, before in zip(times, usual, strict=True))
        if seconds <= LIMITS["slow"].value * max(1.0, *work):
            return
        state["slow"] = [n for n in state["slow"] if n > state["steps"] - AMONG] + [state["steps"]]
        if len(state["slow"]) >= SLOW:
            limit = f"{LIMITS['slow'].value:g} times as long as those before"
            why = "other work seems to share this CPU, and threads wait for the one that has lost its core"
            advice = "--run.threads 1 is often faster then"
            yield "shared_cpu", f"{SLOW} of the last {AMONG} steps took more than {limit}: {why}; {advice}"


def _times(values: Mapping[str, float]) -> list[float] | None:
    """Seconds of the passes and how much there was to do; None for a step that does not say how long it took."""
    passes = [values[f"seconds_{phase}"] for phase in _PASSES if f"seconds_{phase}" in values]
    return [sum(passes), *(values.get(name, 0.0) for name in _WORK)] if passes else None


def _on_cpu(options: RunConfig) -> bool:
    return options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
