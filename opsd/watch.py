"""Warnings while a run trains: a measurement has left its sane band, why that matters and what to change.

`Watch` reads the records of `metrics.jsonl` one by one. It does no I/O and its state is a small dict, so that a resumed
run warns exactly where an uninterrupted one would have.
"""

import copy
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from opsd.config import Config


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

_SAMPLER = (
    "they were not drawn from the student as it is scored; check weights, types and sampling options of the sampler"
)
_CLIP = "of the tokens: it shapes the loss instead of bounding its outliers; raise objective."
TEXTS = {
    "entropy_low": "student entropy {collapse}; lower optim.lr, move objective.beta towards 0, or stop at an earlier "
    "checkpoint",
    "entropy_high": "student entropy has grown to {student_entropy:.3g} nats, from {early_entropy:.3g} at first: its "
    "text may be falling apart; read samples.jsonl, lower optim.lr or use a frozen teacher",
    "truncated": "{truncated:.0%} of the rollouts are cut at {limit} tokens: the teacher judges unfinished text and "
    "endings are not learnt; raise rollout.max_new_tokens",
    "length_limit": "rollouts are {rollout_length:.4g} tokens long on average, at the limit of {limit}: any longer and "
    "they are cut; raise rollout.max_new_tokens",
    "length_low": "rollouts have shrunk to {rollout_length:.4g} tokens on average, from {early_length:.4g} at first: "
    "the student may answer without its work; read samples.jsonl, lower optim.lr, or have prompts.teacher ask for the "
    "work",
    "entry_clip": f"the entry clip touches {{entry_clipped:.0%}} {_CLIP}entry_clip (now {{entry_clip}})",
    "token_clip": f"the token clip touches {{token_clipped:.0%}} {_CLIP}token_clip (now {{token_clip}})",
    "clipped_away": "clipping removes {clipped_away:.0%} of the divergence: most of what the teacher says is lost; "
    "raise {clips}",
    "no_divergence": "divergence has been about 0 from the start ({divergence:.2g} nats): the teacher equals the "
    "student, its privileged context has no effect; compare the two prompts printed at the start",
    "mismatch": "sampler and student differ by {sampler_mismatch:.3g} nats a token on the rollouts: "
    f"{_SAMPLER}{{or_cap}}",
    "capped": f"{{importance_capped:.0%}} of the importance weights are at the cap: {_SAMPLER}",
    "gradient": "gradient norm {grad_norm:.3g}{norm_clipped} is {grad_times:.0f} times its recent median "
    "{usual_norm:.3g}: an unusual batch or the onset of instability; if it recurs, {calm}",
    "shared_cpu": f"{SLOW} of the last {AMONG} steps took more than {LIMITS['slow'].value:g} times as long as those "
    "before: other work seems to share this CPU, and threads wait for the one that has lost its core; --run.threads 1 "
    "is often faster then",
}
"""What is said of each kind of trouble, filled with the numbers of the record and those of `Watch._facts`."""

Values = Mapping[str, float]
"""A record's finite numbers; all others are NaN, for which no comparison holds, so that nothing is said of them."""


class Watch:
    """Judges the records of a run: `for text in watch.check(record): ...`.

    Args:
        config: of the run; says which clips are on, how long a rollout may be, and what to advise.
    """

    def __init__(self, config: Config):
        self._config = config
        device, threads = config.run.device, config.run.threads or torch.get_num_threads()
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        self._shares_cpu = on_cpu and threads > 1
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
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)}
        values: Values = defaultdict(lambda: math.nan, numbers)
        state["steps"] += 1
        broken = [kind for kind, outside in self._outside(values).items() if outside]
        facts = self._facts(values) if broken else {}
        self._remember(values)
        news = []
        for kind in broken:
            last = state["said"].get(kind)
            if last is None or state["inside"][kind] >= RECOVERED or state["steps"] - last >= AGAIN:
                news.append(TEXTS[kind].format_map({**values, **facts}))
                state["said"][kind] = state["steps"]
            state["inside"][kind] = 0
        for kind in state["said"].keys() - set(broken):
            state["inside"][kind] = min(RECOVERED, state["inside"][kind] + 1)
        return news

    def _baseline(self, name: str) -> float:
        """The early mean of `name`; NaN until it is known."""
        count, total = self._state["early"].get(name, (0, 0.0))
        return total / count if count == BASELINE_STEPS else math.nan

    def _remember(self, values: Values) -> None:
        for name in _BASELINES:
            count, total = self._state["early"].get(name, (0, 0.0))
            if not math.isnan(values[name]) and count < BASELINE_STEPS:
                self._state["early"][name] = [count + 1, total + values[name]]
        if not math.isnan(values["grad_norm"]):
            self._state["norms"] = [*self._state["norms"], values["grad_norm"]][-RECENT:]
        if (times := _times(values)) is not None:
            self._state["times"] = [*self._state["times"], times][-PACE:]

    def _outside(self, values: Values) -> dict[str, bool]:
        """Which kinds of trouble there are."""
        rollout, early, most = self._config.rollout, self._baseline, {k: limit.value for k, limit in LIMITS.items()}
        entropy, length, teacher = values["student_entropy"], values["rollout_length"], self._teacher_entropy(values)
        surer = math.isnan(teacher) or entropy < most["entropy_of_teacher"] * teacher
        cut = values["truncated"] > most["truncated"]
        divergence, cap = values["divergence"], rollout.importance_cap
        # Cut-offs alone make tokens likelier for the sampler than for the student, by more than the limit.
        exact = rollout.top_p == 1 and rollout.top_k == 0 and rollout.min_p == 0
        return {
            "entropy_low": entropy < most["entropy_floor"]
            or (entropy < most["entropy_share"] * early("student_entropy") and surer),
            "entropy_high": entropy > most["entropy_of_note"]
            and entropy > most["entropy_growth"] * early("student_entropy"),
            "truncated": cut,
            "length_limit": length > most["length_of_limit"] * rollout.max_new_tokens and not cut,
            "length_low": length < most["length_share"] * early("rollout_length"),
            "entry_clip": values["entry_clipped"] > most["touched"],
            "token_clip": values["token_clipped"] > most["touched"],
            "clipped_away": divergence > most["divergence"]
            and values["clipped_amount"] > most["clipped_away"] * divergence,
            "no_divergence": self._never_apart(divergence),
            "mismatch": abs(values["sampler_mismatch"]) > most["mismatch"] and exact,
            # A cap of 1 or less also holds back tokens of a sampler that agrees perfectly.
            "capped": values["importance_capped"] > most["capped"] and (cap is None or cap > 1),
            "gradient": 0 < self._usual_norm() < values["grad_norm"] / most["gradient"],
            "shared_cpu": self._waits_for_a_core(values),
        }

    def _facts(self, values: Values) -> dict[str, Any]:
        """What `TEXTS` say beyond the record."""
        config, entropy, teacher = self._config, values["student_entropy"], self._teacher_entropy(values)
        early, floor, usual = self._baseline("student_entropy"), LIMITS["entropy_floor"].value, self._usual_norm()
        collapse = f"is {entropy:.2g} nats, below {floor:g}: its rollouts no longer vary"
        if not entropy < floor:
            than = f"{early:.3g} at first" + ("" if math.isnan(teacher) else f" and the teacher's {teacher:.3g}")
            collapse = f"has collapsed to {entropy:.3g} nats, from {than}: rollouts lose their variety"
        norm, clip, divergence = values["grad_norm"], config.optim.max_grad_norm, values["divergence"]
        clips = {name: getattr(config.objective, name) for name in ("entry_clip", "token_clip")}
        return {
            **clips,
            "limit": config.rollout.max_new_tokens,
            "early_entropy": early,
            "early_length": self._baseline("rollout_length"),
            "collapse": collapse,
            "clips": " or ".join(f"objective.{name}" for name, on in clips.items() if on is not None) or "the clip",
            "clipped_away": values["clipped_amount"] / divergence if divergence else math.nan,
            "or_cap": ", or weight them with rollout.importance_cap" if config.rollout.importance_cap is None else "",
            "usual_norm": usual,
            "grad_times": norm / usual if usual else math.nan,
            "norm_clipped": "" if clip is None or norm <= clip else f" (clipped to {clip:g})",
            "calm": "set optim.max_grad_norm" if clip is None else "lower optim.lr",
        }

    def _teacher_entropy(self, values: Values) -> float:
        """A teacher that shares the student's weights collapses with it, so it only counts as it was at first."""
        shared = self._config.teacher.kind in ("live", "ema")
        return self._baseline("teacher_entropy") if shared else values["teacher_entropy"]

    def _usual_norm(self) -> float:
        norms = self._state["norms"]
        return statistics.median(norms) if len(norms) >= BASELINE_STEPS else math.nan

    def _never_apart(self, divergence: float) -> bool:
        """Only from the start: a divergence that vanishes later is what training is for."""
        if math.isnan(divergence):
            return False
        if self._state["no_divergence"] >= 0:
            none = abs(divergence) < LIMITS["divergence"].value
            self._state["no_divergence"] = self._state["no_divergence"] + 1 if none else -1
        return self._state["no_divergence"] >= BASELINE_STEPS

    def _waits_for_a_core(self, values: Values) -> bool:
        """Threads wait for each other once one has lost its core; said once, as it is no matter of the training."""
        state, times = self._state, _times(values)
        unknown = times is None or len(state["times"]) < BASELINE_STEPS
        if not self._shares_cpu or unknown or "shared_cpu" in state["said"]:
            return False
        # relative to the recent steps; 0 for what these had none of
        usual = [statistics.median(column) for column in zip(*state["times"], strict=True)]
        seconds, *work = (now / before if before else 0.0 for now, before in zip(times or (), usual, strict=True))
        if seconds <= LIMITS["slow"].value * max(1.0, *work):
            return False
        state["slow"] = [n for n in state["slow"] if n > state["steps"] - AMONG] + [state["steps"]]
        return len(state["slow"]) >= SLOW


def _times(values: Values) -> list[float] | None:
    """Seconds of the passes and how much there was to do; None for a step that does not say how long it took."""
    passes = [values[f"seconds_{phase}"] for phase in _PASSES if f"seconds_{phase}" in values]
    work = [0.0 if math.isnan(values[name]) else values[name] for name in _WORK]
    return [sum(passes), *work] if passes else None
