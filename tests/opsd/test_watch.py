import json

import pytest
import torch

from opsd.config import load_config
from opsd.watch import AGAIN, AMONG, BASELINE_STEPS, LIMITS, PACE, RECOVERED, Watch

SANE = {
    "loss": 0.05,
    "grad_norm": 0.2,
    "divergence": 0.05,
    "student_entropy": 0.4,
    "teacher_entropy": 0.2,
    "entry_clipped": 0.1,
    "clipped_amount": 0.01,
    "token_clipped": 0.0,
    "rollout_length": 60.0,
    "truncated": 0.1,
    "sampler_mismatch": 0.005,
    "importance_capped": 0.01,
    "tokens": 600,
    "rollout_length_max": 90,
    "teacher_context_length": 200.0,
    "seconds": 3.0,
    "seconds_rollout": 2.0,
    "seconds_teacher": 0.2,
    "seconds_backward": 0.6,
    "seconds_samples": 0.1,
}
SHARED = {"run__device": "cpu", "run__threads": 2}
SLOW = {"seconds_teacher": 2.0, "seconds_backward": 2.1}


def watch(**options):
    given = {"model.path": "m", "data.train": "t", "rollout.max_new_tokens": 100, "objective.entry_clip": 0.2}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    return Watch(load_config(None, given.items()))


def follow(watched, *changes):
    """The warnings at each step of a run."""
    return [watched.check({"step": n, **SANE, **change}) for n, change in enumerate(changes, 1)]


def after_start(change, **options):
    """The warnings of one step after a sane start, which has none."""
    *start, last = follow(watch(**options), *[{}] * BASELINE_STEPS, change)
    assert not any(start)
    return last


def test_a_sane_run_is_silent():
    assert not any(follow(watch(), *[{}] * 200))


def test_a_student_that_comes_to_its_teacher_is_sane():
    """As in the embedded run: entropy and divergence fall by far more than tenfold, to the teacher's."""
    steps = [0.9**n for n in range(80)]
    falling = ("divergence", "clipped_amount", "grad_norm")
    changes = [{name: SANE[name] * s for name in falling} for s in steps]
    entropies = [{"student_entropy": 0.01 + 0.4 * s, "teacher_entropy": 0.01} for s in steps]
    assert not any(follow(watch(), *[{**a, **b} for a, b in zip(changes, entropies, strict=True)]))


CASES = [
    # what, the last value in the band, the first out of it, words of the warning
    ("student_entropy", {}, 0.0401, 0.0399, ["student entropy", "0.0399", "0.4 at first", "optim.lr"]),
    ("student_entropy", {}, 1.19, 1.21, ["student entropy has grown", "1.21", "optim.lr"]),
    ("rollout_length", {}, 18.1, 17.9, ["17.9 tokens", "60 at first", "samples.jsonl"]),
    ("rollout_length", {}, 94.9, 95.1, ["95.1 tokens", "limit of 100", "rollout.max_new_tokens"]),
    ("truncated", {}, 0.5, 0.51, ["51%", "unfinished text", "rollout.max_new_tokens"]),
    ("entry_clipped", {}, 0.5, 0.51, ["entry clip", "51%", "objective.entry_clip (now 0.2)"]),
    ("token_clipped", {"objective.token_clip": 3}, 0.5, 0.51, ["token clip", "objective.token_clip (now 3.0)"]),
    ("clipped_amount", {}, 0.0249, 0.0251, ["50% of the divergence", "objective.entry_clip"]),
    ("sampler_mismatch", {}, 0.099, 0.101, ["0.101 nats", "rollout.importance_cap"]),
    ("importance_capped", {"rollout.importance_cap": 2}, 0.099, 0.101, ["10%", "cap"]),
    ("grad_norm", {}, 1.99, 2.01, ["gradient norm 2.01", "clipped to 1", "10 times", "optim.lr"]),
    ("grad_norm", {"optim.max_grad_norm": "none"}, 1.99, 2.01, ["gradient norm 2.01", "set optim.max_grad_norm"]),
]


@pytest.mark.parametrize(("name", "options", "inside", "outside", "parts"), CASES)
def test_each_band_has_its_edge(name, options, inside, outside, parts):
    options = {option.replace(".", "__"): value for option, value in options.items()}
    assert after_start({name: inside}, **options) == []
    (warning,) = after_start({name: outside}, **options)
    assert all(part in warning for part in parts), warning
    assert "\n" not in warning


def test_without_entropy_there_is_nothing_to_learn_from_at_any_time():
    assert follow(watch(), {"student_entropy": 0.0011, "teacher_entropy": 0.0}) == [[]]
    ((warning,),) = follow(watch(), {"student_entropy": 0.0009, "teacher_entropy": 0.0009})
    assert "no longer vary" in warning


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_entropy_may_fall_to_that_of_a_teacher_that_does_not_fall_with_it(kind):
    low = {"student_entropy": 0.01, "teacher_entropy": 0.01}
    assert bool(after_start(low, teacher__kind=kind)) == (kind != "base")
    assert after_start({**low, "teacher_entropy": 0.021}, teacher__kind=kind)


def test_a_small_entropy_may_grow():
    low = [{"student_entropy": 0.01, "teacher_entropy": 0.01}] * BASELINE_STEPS
    assert not any(follow(watch(), *low, {"student_entropy": 0.09}))
    assert follow(watch(), *low, {"student_entropy": 0.11})[-1]


@pytest.mark.parametrize("change", [
    {"student_entropy": 0.02}, {"student_entropy": 4.0}, {"rollout_length": 6.0}, {"grad_norm": 9.0},
])  # fmt: skip
def test_what_needs_a_baseline_waits_for_it(change):
    for before in range(BASELINE_STEPS):
        assert follow(watch(), *[{}] * before, change)[-1] == []
    assert after_start(change)


def test_no_divergence_is_only_wrong_from_the_start():
    none = {"divergence": 5e-5, "clipped_amount": 0.0}
    said = follow(watch(), *[none] * BASELINE_STEPS)
    assert not any(said[:-1])
    assert "privileged context has no effect" in said[-1][0]
    assert follow(watch(), *[{**none, "divergence": -5e-5}] * BASELINE_STEPS)[-1]
    assert not any(follow(watch(), none, none, {**none, "divergence": 2e-4}, *[none] * 60))
    assert not any(follow(watch(), *[{**none, "divergence": -0.05}] * BASELINE_STEPS))


def test_clipping_is_not_judged_without_a_divergence():
    assert after_start({"divergence": 1e-5, "clipped_amount": 1e-5}) == []


@pytest.mark.parametrize("cut", [{"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.1}])
def test_what_the_users_cut_offs_do_is_no_fault_of_the_sampler(cut):
    options = {f"rollout__{name}": value for name, value in cut.items()}
    assert after_start({"sampler_mismatch": 0.7}, **options) == []


def test_a_cap_of_one_holds_back_tokens_of_any_sampler():
    assert after_start({"importance_capped": 0.5}, rollout__importance_cap=1) == []


def test_the_gradient_is_compared_with_the_recent_median():
    falling = [{"grad_norm": 100 * 0.9**n} for n in range(60)]
    assert follow(watch(), *falling, {"grad_norm": 6.0})[-1]
    spiky = [{"grad_norm": 0.1}, {"grad_norm": 0.1}, {"grad_norm": 90.0}, {"grad_norm": 0.1}, {"grad_norm": 0.1}]
    assert "20 times its recent median 0.1" in follow(watch(), *spiky, {"grad_norm": 2.0})[-1][0]
    assert not any(follow(watch(), *[{"grad_norm": 0.0}] * 9, {"grad_norm": 1.0}))


def test_threads_that_wait_for_a_core_are_told_of_once():
    said = follow(
        watch(**SHARED), *[{}] * BASELINE_STEPS, SLOW, {}, SLOW, *[{}] * (AMONG - 4), SLOW, *[{}, SLOW] * AGAIN
    )
    assert [n for n, warnings in enumerate(said, 1) if warnings] == [BASELINE_STEPS + AMONG]
    (warning,) = said[BASELINE_STEPS + AMONG - 1]
    assert "--run.threads 1 is often faster" in warning
    assert "3 of the last 20 steps" in warning
    # a fall for good is told of, too, before it becomes the usual
    assert sum(map(len, follow(watch(**SHARED), *[{}] * 2 * PACE, *[SLOW] * 2 * PACE))) == 1


@pytest.mark.parametrize("changes", [
    [*[{}] * BASELINE_STEPS, SLOW, SLOW, *[{}] * (AMONG - 2), SLOW],  # one too late
    [SLOW, SLOW, SLOW, *[{}] * AMONG],  # a slow start
    [*[{}] * BASELINE_STEPS, *[{"seconds_teacher": 0.2, "seconds_backward": 3.79}] * 9],
    *([*[{}] * BASELINE_STEPS, *[{**SLOW, name: 6 * SANE[name]}] * 9]
      for name in ("tokens", "rollout_length_max", "teacher_context_length")),
    [*[{}] * BASELINE_STEPS,
     *[{"seconds_rollout": 90.0, "seconds_samples": 90.0, "seconds_reason": 90.0, "seconds": 99.0}] * 9],
])  # fmt: skip
def test_slow_steps_for_which_there_may_be_a_reason_say_nothing_of_the_cpu(changes):
    assert not any(follow(watch(**SHARED), *changes))


def test_the_time_of_a_step_has_its_edge():
    just = {"seconds_teacher": 0.2, "seconds_backward": 3.81}
    assert follow(watch(**SHARED), *[{}] * BASELINE_STEPS, *[just] * 3)[-1]
    assert follow(watch(**SHARED), *[{}] * BASELINE_STEPS, *[{**just, "tokens": 590, "rollout_length_max": None}] * 3)[
        -1
    ]


@pytest.mark.parametrize(("device", "threads", "torch_threads", "cuda", "warns"), [
    ("cpu", 2, 1, True, True), ("cpu", None, 2, True, True), ("auto", None, 2, False, True),
    ("cpu", 1, 2, False, False), ("cpu", None, 1, False, False), ("auto", 2, 2, True, False),
    ("cuda", 2, 2, True, False),
])  # fmt: skip
def test_only_threads_of_a_cpu_wait_for_each_other(monkeypatch, device, threads, torch_threads, cuda, warns):
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    options = {"run__device": device} | ({} if threads is None else {"run__threads": threads})
    assert bool(follow(watch(**options), *[{}] * BASELINE_STEPS, *[SLOW] * 3)[-1]) == warns


def test_a_warning_is_said_again_after_a_while():
    said = follow(watch(), *[{"truncated": 0.9}] * (2 * AGAIN + 1))
    assert [n for n, warnings in enumerate(said) if warnings] == [0, AGAIN, 2 * AGAIN]


@pytest.mark.parametrize("well", [1, RECOVERED - 1, RECOVERED, RECOVERED + 3])
def test_a_warning_is_said_again_after_a_recovery_but_not_for_a_value_that_hovers(well):
    *_, last = follow(watch(), {"truncated": 0.9}, *[{}] * well, {"truncated": 0.9})
    assert bool(last) == (well >= RECOVERED)
    hovering = [{"truncated": 0.9}, *[{}] * (RECOVERED - 1)] * 4
    assert sum(map(len, follow(watch(), *hovering))) == 1


def test_kinds_do_not_silence_each_other():
    first, second = follow(watch(), {"truncated": 0.9}, {"truncated": 0.9, "entry_clipped": 0.9})
    assert len(first) == len(second) == 1
    assert "entry clip" in second[0]


def test_what_is_absent_or_no_number_is_not_judged():
    watched = watch()
    for n in range(1, 20):
        assert watched.check({"step": n, **dict.fromkeys(SANE), "note": "x"}) == []
        assert watched.check({"step": n, **dict.fromkeys(SANE, float("nan"))}) == []
        assert watched.check({"step": n}) == []
    assert not any(follow(watched, *[{}] * BASELINE_STEPS))
    assert follow(watched, {"student_entropy": 0.01})[-1]


def test_a_resumed_run_warns_as_an_uninterrupted_one():
    changes = [{"grad_norm": 0.1 + n % 3, "student_entropy": 0.4 + 0.1 * n / 3} for n in range(4)] + [{}] * 4
    changes += [{"truncated": 0.9, "student_entropy": 0.01, "rollout_length": 3.0, "grad_norm": 99.0}] * 3
    changes += [{}] * RECOVERED + [{"rollout_length": 3.0}] + [{"truncated": 0.9}] * AGAIN + [SLOW, {}] * 4
    expected = follow(watch(**SHARED), *changes)
    assert sum(map(len, expected)) >= 7
    records = [{"step": n, **SANE, **change} for n, change in enumerate(changes, 1)]
    for stop in range(len(changes)):
        first, second = watch(**SHARED), watch(**SHARED)
        said = [first.check(record) for record in records[:stop]]
        kept = first.state_dict()
        for record in records[stop:]:  # what the killed run went on to see must not reach the resumed one
            first.check(record)
        second.load_state_dict(json.loads(json.dumps(kept, allow_nan=False)))
        said += [second.check(record) for record in records[stop:]]
        assert said == expected, stop


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"state has .*accepted: .*norms"):
        watch().load_state_dict({"step": 1})


def test_every_limit_is_justified():
    assert all(limit.value > 0 and len(limit.why.split()) > 5 for limit in LIMITS.values())
