import dataclasses
import math
import random
import time

import pytest
import torch
from _models import examples, lora, model, run_of

from opsd import recipes
from opsd.errors import ConfigError
from opsd.plugins import UserEngine, UserLoss
from opsd.rollouts import Rollout
from opsd.scoring import rollout_hidden, rollout_index, stream_of, supervised_loss
from opsd.step import group_rollouts, opsd_step

ROLLOUTS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 14, 1], [15], [16, 17, 18]]


def fixed(per_prompt: int = 1):
    """`per_prompt` rollouts of given ids and log-probabilities for each example: what is compared is scoring alone."""
    draw = random.Random(0)
    ids = [rollout for own in ROLLOUTS for rollout in (own, *([3 + g] * (1 + 3 * g) for g in range(1, per_prompt)))]
    return [Rollout(own, own[-1] != 1, [draw.uniform(-6, 0) for _ in own]) for own in ids]


def same_gradients(actual, expected):
    """To float32, in which the norms of these models compute whatever the rest does."""
    assert actual.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=2e-6 * gradient.abs().max().item(), msg=name)


@pytest.fixture
def fixed_rollouts(monkeypatch):
    """Sampling gives those of `fixed`."""
    given = lambda engine, run, *_: fixed(run.config.rollout.per_prompt)  # noqa: E731
    monkeypatch.setattr("opsd.engines.GenerateEngine.rollouts", given)


def gradients(student, packed=False, **options):
    student.zero_grad()
    run = dataclasses.replace(run_of(student, **options), packed=packed)
    run.model.eval()  # dropout off
    result = opsd_step(run, examples(), 1)
    return result, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_rows_are_those_of_unpadded_single_passes(kind):
    student = model(kind).double().eval()
    prompts = [example.student for example in examples()]
    rows = rollout_hidden(student, prompts, ROLLOUTS)
    targets, sequences = rollout_index(ROLLOUTS, rows.device)
    start = 0
    for number, (prompt, rollout) in enumerate(zip(prompts, ROLLOUTS, strict=True)):
        logits = student(torch.tensor([prompt + rollout])).logits[0, len(prompt) - 1 : -1]
        ours = student.get_output_embeddings()(rows[start : start + len(rollout)])
        torch.testing.assert_close(ours, logits, rtol=1e-9, atol=1e-9)
        assert targets[start : start + len(rollout)].tolist() == rollout
        assert set(sequences[start : start + len(rollout)].tolist()) == {number}
        start += len(rollout)
    assert start == len(rows) == len(targets)


@pytest.mark.parametrize("per_prompt", [1, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("form", "reduction", "adapted", "cap"), [
    ("full", "mean", False, None),
    ("full", "sequence_mean", True, 1.5),
    ("sampled_token", "mean", True, 1.5),
    ("sampled_token", "sequence_mean", False, None),
])  # fmt: skip
def test_micro_batch_size_changes_nothing(fixed_rollouts, form, reduction, adapted, cap, packed, per_prompt):
    student = model("qwen3").double()
    student = lora(student) if adapted else student
    options = {"objective__form": form, "objective__reduction": reduction, "rollout__importance_cap": cap}
    options |= {"packed": packed, "rollout__per_prompt": per_prompt}
    whole, expected = gradients(student, **options, optim__micro_batch_size=5 * per_prompt)
    assert len(whole.rollouts) == 5 * per_prompt
    for size in (1, 3):
        result, actual = gradients(student, **options, optim__micro_batch_size=size)
        same_gradients(actual, expected)
        torch.testing.assert_close(result.loss, whole.loss, rtol=1e-6, atol=0)
        assert result.metrics.keys() == whole.metrics.keys()
        for name, value in whole.metrics.items():
            if name != "top_k_overlap":  # an estimate from the first micro-batch
                assert math.isclose(float(result.metrics[name]), float(value), rel_tol=1e-6), name


def dense_loss(student, teacher, reduction, form, beta, *, per_prompt=1, cap=None, sampled_at=1.0):
    """The definition, one sequence at a time, with full logits."""
    per_sequence = []
    for number, written in enumerate(fixed(per_prompt)):
        example, rollout = examples()[number // per_prompt], written.ids

        def logits(m, prompt, rollout=rollout):
            return m(torch.tensor([prompt + rollout])).logits[0, len(prompt) - 1 : -1]

        at = torch.tensor(rollout)[:, None]
        z = logits(student, example.student)
        s = z.log_softmax(-1)
        with torch.no_grad():
            t = logits(teacher, example.teacher).log_softmax(-1)
        if form == "full":
            m = ((1 - beta) * s.exp() + beta * t.exp()).log()
            tokens = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
        else:
            s, t = s.gather(-1, at)[:, 0], t.gather(-1, at)[:, 0]
            tokens = -(t - s).detach() * s
        if cap is not None:
            own = (z.detach() / sampled_at).softmax(-1).gather(-1, at)[:, 0]
            tokens = tokens * (own / torch.tensor(written.logprobs).double().exp()).clamp(max=cap)
        per_sequence.append(tokens)
    if reduction == "mean":
        return torch.cat(per_sequence).mean()
    return torch.stack([tokens.mean() for tokens in per_sequence]).mean()


def moved(student):
    """`student` as after some training, in place: a frozen copy must not follow."""
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("form", ["full", "sampled_token"])
@pytest.mark.parametrize(("kind", "per_prompt", "weighting"), [
    ("base", 1, {}),
    ("live", 1, {}),
    ("base", 3, {"cap": 2.0, "sampled_at": 0.7}),
    ("live", 2, {"cap": 0.8}),
])  # fmt: skip
def test_step_is_the_definition(fixed_rollouts, form, reduction, kind, packed, per_prompt, weighting):
    student = model().double().eval()
    options = {"teacher__kind": kind, "objective__form": form, "objective__reduction": reduction}
    options |= {"rollout__per_prompt": per_prompt, "rollout__importance_cap": weighting.get("cap")}
    run = run_of(student, **options, rollout__temperature=weighting.get("sampled_at", 1.0))
    run = dataclasses.replace(run, packed=packed)
    initial = model(seed=0).double().eval()
    moved(student)
    result = opsd_step(run, examples(), 1)
    actual = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    teacher = initial if kind == "base" else student
    loss = dense_loss(student, teacher, reduction, form, 0.5, per_prompt=per_prompt, **weighting)
    loss.backward()
    assert loss.abs() > 1e-3
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-6, atol=1e-9)
    same_gradients(actual, {n: p.grad for n, p in student.named_parameters()})


def test_importance_weights_are_reported(fixed_rollouts):
    """Against the definition, token by token; without a cap only where nothing has to be computed for it."""
    student = model().double().eval()
    ratios = []
    for example, written in zip(examples(), fixed(), strict=True):
        ids, n = torch.tensor([example.student + written.ids]), len(example.student)
        logits = student(ids).logits[0, n - 1 : -1] / 0.7
        own = logits.log_softmax(-1).gather(-1, ids[0, n:, None])[:, 0]
        ratios.append((own - torch.tensor(written.logprobs)).detach())
    log_ratio = torch.cat(ratios)
    capped = (log_ratio.exp() > 0.8).double().mean()
    assert 0 < capped < 1
    result, _ = gradients(student, rollout__temperature=0.7, rollout__importance_cap=0.8)
    expected = {
        "sampler_mismatch": log_ratio.abs().mean(),
        "importance_capped": capped,
        "importance_weight": log_ratio.exp().clamp(max=0.8).mean(),
    }
    for name, value in expected.items():
        assert float(result.metrics[name]) == pytest.approx(value.item(), rel=1e-5), name
    for form in ("full", "sampled_token"):
        known, _ = gradients(student, rollout__temperature=0.7, objective__temperature=0.7, objective__form=form)
        assert float(known.metrics["sampler_mismatch"]) == pytest.approx(log_ratio.abs().mean().item(), rel=1e-5)
        assert not {"importance_weight", "importance_capped"} & known.metrics.keys()
    unknown, _ = gradients(student, rollout__temperature=0.7)
    assert "sampler_mismatch" not in unknown.metrics


def test_the_samplers_probabilities_are_the_students_unless_cut(monkeypatch):
    student = model()
    on_policy, _ = gradients(student, packed=True, rollout__importance_cap=1.0)
    assert float(on_policy.metrics["sampler_mismatch"]) < 1e-4
    assert float(on_policy.metrics["importance_weight"]) == pytest.approx(1, abs=1e-4)
    cut, _ = gradients(student, packed=True, rollout__importance_cap=1.0, rollout__top_p=0.5)
    assert float(cut.metrics["sampler_mismatch"]) > 0.1
    assert float(cut.metrics["importance_weight"]) < 0.9  # cutting made the tokens likelier than the student has them
    assert float(cut.metrics["importance_capped"]) < 0.2


def test_weights_of_one_change_nothing(monkeypatch):
    student = model().double()
    ones = lambda recipe, student, *_: (student.hidden.new_ones(len(student.hidden)), {})  # noqa: E731
    monkeypatch.setattr("opsd.recipes.importance.importance_weights", ones)
    for form in ("full", "sampled_token"):
        plain, expected = gradients(student, objective__form=form)
        weighted, actual = gradients(student, objective__form=form, rollout__importance_cap=1.0)
        assert plain.loss.abs() > 1e-3
        torch.testing.assert_close(weighted.loss, plain.loss, rtol=1e-12, atol=0)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12)


def sampled(run, batch, number):
    return run.engine.rollouts(run, batch, number)


def test_rollouts_of_a_prompt_come_together_and_differ():
    run = run_of(model(), rollout__per_prompt=3, rollout__batch_size=4)
    rollouts = sampled(run, examples(), 7)
    assert len(rollouts) == 15
    assert len({tuple(r.ids) for r in rollouts}) == 15
    seen = model().eval()
    for i, r in enumerate(rollouts):  # each of them a sample after its own prompt
        prompt = examples()[i // 3].student
        logp = seen(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert r.logprobs == pytest.approx(logp.gather(1, torch.tensor(r.ids)[:, None])[:, 0].tolist(), abs=1e-4)
    again = sampled(run_of(model(), rollout__per_prompt=3, rollout__batch_size=1), examples(), 7)
    assert [r.ids for r in again] == [r.ids for r in rollouts]
    fewer = sampled(run_of(model()), examples(), 7)
    assert [r.ids for r in fewer] == [r.ids for r in rollouts[::3]]
    twice = sampled(run, [examples()[0]] * 2, 7)  # one example at two places of a batch
    assert {tuple(r.ids) for r in twice[:3]}.isdisjoint(tuple(r.ids) for r in twice[3:])
    assert all(a.ids != b.ids for a, b in zip(sampled(run, examples(), 8), rollouts, strict=True))


def test_packed_rows_hold_a_prompt_once_for_all_its_rollouts(monkeypatch, fixed_rollouts):
    import opsd.scoring

    batches, real = [], opsd.scoring.dual_hidden_states
    monkeypatch.setattr(opsd.scoring, "dual_hidden_states", lambda m, b, **k: batches.append(b) or real(m, b, **k))
    gradients(model(), packed=True, rollout__per_prompt=4, optim__micro_batch_size=11)
    assert [b.student.layout.rows > 0 for b in batches] == [True] * 3  # two prompts with four rollouts each, then one
    fed = sum(len(r.ids) - 1 for r in fixed(4))
    assert sum(b.student.layout.rows for b in batches) == fed + sum(len(e.student) for e in examples())
    assert sum(b.teacher.layout.rows for b in batches) == fed + sum(len(e.teacher) for e in examples())


@pytest.mark.parametrize(("given", "error", "part"), [
    (fixed()[:4], ValueError, "4 rollouts for 5 examples; accepted: 5"),
    ([*fixed()[:4], Rollout([], True)], ValueError, "rollout 0 of example 4 is empty"),
    (None, TypeError, "the sampler returned NoneType; accepted: a list of opsd.rollouts.Rollout"),
    ([*fixed()[:4], Rollout(torch.tensor([5, 6]), True)], TypeError, "example 4 has ids of type Tensor; accepted: a"),
    ([*fixed()[:4], Rollout([5], True, torch.ones(1))], TypeError, "logprobs of type Tensor; accepted: a list"),
    ([*fixed()[:4], Rollout([5], True, [None])], TypeError, "the log-probability None; accepted: a float"),
    ([*fixed()[:4], Rollout([5], "length", [-1.0])], TypeError, "truncated 'length'; accepted: True or False"),
    ([*fixed()[:4], [5, 6]], TypeError, "rollout 0 of example 4 must be an opsd.rollouts.Rollout, got list"),
    ([*fixed()[:4], Rollout([5, 10**6], True)], ValueError, "token id 1000000; accepted: ints from 0 to"),
    ([*fixed()[:4], Rollout([5, -1], True)], ValueError, "token id -1"),
    ([*fixed()[:4], Rollout([5.0], True)], ValueError, "token id 5.0"),
    ([*fixed()[:4], Rollout([5, 6], True, [-1.0])], ValueError, "2 ids and 1 logprobs"),
    ([*fixed()[:4], Rollout([5], True, [-math.inf])], ValueError, "log-probability -inf"),
    ([*fixed()[:4], Rollout([5], True)], ValueError, "4 of 5 rollouts have logprobs"),
    ([Rollout([5], True)] * 5, ValueError, "rollout.importance_cap needs"),
])  # fmt: skip
def test_a_samplers_mistakes_are_named(given, error, part):
    run = run_of(model(), rollout__importance_cap=1.0)
    run = dataclasses.replace(run, engine=UserEngine(lambda *_: given, run.engine))
    with pytest.raises(error) as raised:
        opsd_step(run, examples(), 1)
    assert part in str(raised.value)


@pytest.mark.parametrize(("make", "error", "part"), [
    (lambda loss, d: loss, TypeError, "the loss function (loss) returned a tensor of shape (); accepted: (loss, stat"),
    (lambda loss, d: None, TypeError, "returned None; accepted: (loss, statistics)"),
    (lambda loss, d: (loss, {}, 0), ValueError, "returned 3 values; accepted: (loss, statistics)"),
    (lambda loss, d: (loss, None), TypeError, "returned None as the statistics; accepted: a dict of (R,) tensors"),
    (lambda loss, d: (loss.item(), {}), TypeError, "as the loss; accepted: (loss, statistics)"),
    (lambda loss, d: (d, {}), ValueError, "a loss of shape (11,); accepted: 0-d"),
    (lambda loss, d: (loss.detach(), {}), ValueError, "a loss without a gradient; accepted: one computed"),
    (lambda loss, d: (loss, {"d": 0.5}), TypeError, "0.5 as statistic 'd'; accepted: an (R,) tensor, here (11,)"),
    (lambda loss, d: (loss, {"d": loss}), ValueError, "statistic 'd' of shape (); accepted: (R,), one value for each"),
    (lambda loss, d: (loss, {"d": d[1:]}), ValueError, "statistic 'd' of shape (10,); accepted: (R,)"),
    (lambda loss, d: (loss, {"loss": d}), ValueError, "a statistic called 'loss'; accepted: text other than"),
    (lambda loss, d: (loss, {3: d}), ValueError, "a statistic called 3"),
    (lambda loss, d: (loss, {f"d{len(d)}": d}), ValueError, "called d5, for another micro-batch d11; accepted"),
])  # fmt: skip
def test_a_losss_mistakes_are_named(fixed_rollouts, make, error, part):
    """Of eleven tokens in the first micro-batch and five in the second."""

    def divergence(run, student_hidden, teacher_hidden, rollouts, denominator):
        distance = (student_hidden - teacher_hidden).square().sum(-1)
        return make(distance.sum() / denominator, distance)

    run = run_of(model(), optim__micro_batch_size=2)
    run = dataclasses.replace(run, recipe=UserLoss(divergence, run))
    with pytest.raises(error) as raised:
        opsd_step(run, examples(), 1)
    assert part in str(raised.value)


def test_sampler_and_divergence_can_be_replaced():
    student, calls = model().double().eval(), []

    def sampler(run, batch, number):
        calls.append((len(batch), number))
        return [Rollout(r.ids, r.truncated) for r in fixed(2)]

    def divergence(run, student_hidden, teacher_hidden, rollouts, denominator):
        assert student_hidden.shape == teacher_hidden.shape == (sum(len(r.ids) for r in rollouts), 32)
        calls.append(denominator)
        distance = (student_hidden - teacher_hidden).square().sum(-1)
        return distance.sum() / denominator, {"distance": distance}

    options = {"rollout__per_prompt": 2, "optim__micro_batch_size": 3}
    run = run_of(student, **options)
    run = dataclasses.replace(run, engine=UserEngine(sampler, run.engine), recipe=UserLoss(divergence, run))
    result = opsd_step(run, examples(), 4)
    tokens = sum(len(r.ids) for r in fixed(2))
    assert calls == [(5, 4), *[tokens] * 4]
    prompts, ids = [e for e in examples() for _ in range(2)], [r.ids for r in fixed(2)]
    ours = rollout_hidden(student, [e.student for e in prompts], ids)
    theirs = rollout_hidden(student, [e.teacher for e in prompts], ids)
    expected = (ours - theirs).square().sum(-1).mean().item()
    assert expected > 0.1
    assert result.loss.item() == pytest.approx(expected)
    assert float(result.metrics["distance"]) == pytest.approx(expected)
    assert any(p.grad.abs().max() > 1e-3 for p in student.parameters() if p.grad is not None)
    assert "divergence" not in result.metrics
    assert "sampler_mismatch" not in result.metrics


def test_lengths_and_overlap_are_reported(fixed_rollouts):
    student = model().double().eval()
    run = run_of(student, optim__micro_batch_size=5)
    moved(student)
    metrics = opsd_step(run, examples(), 1).metrics
    assert metrics["rollout_length"] == pytest.approx(17 / 5)
    assert (metrics["rollout_length_min"], metrics["rollout_length_max"]) == (1, 7)
    assert metrics["truncated"] == pytest.approx(2 / 5)
    assert metrics["teacher_context_length"] == pytest.approx(52 / 5)
    shares, initial = [], model().double().eval()
    for example, rollout in zip(examples(), ROLLOUTS, strict=True):
        tops = []
        for m, prompt in ((student, example.student), (initial, example.teacher)):
            logits = m(torch.tensor([prompt + rollout])).logits[0, len(prompt) - 1 : -1]
            tops.append([set(row.topk(8).indices.tolist()) for row in logits])
        shares += [len(ours & theirs) / 8 for ours, theirs in zip(*tops, strict=True)]
    assert 0 < sum(shares) < len(shares)
    assert float(metrics["top_k_overlap"]) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(("packed", "joint", "phases"), [
    (False, False, ["rollout", "teacher", "student", "loss", "backward"]),
    (True, False, ["rollout", "teacher", "student", "loss", "backward"]),
    (True, True, ["rollout", "score", "loss", "backward"]),
])  # fmt: skip
def test_phases_are_timed_apart(fixed_rollouts, packed, joint, phases):
    student = model().train()
    run = dataclasses.replace(run_of(student, teacher__kind="live" if joint else "base"), packed=packed, joint=joint)
    if joint:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        run.teacher.source.model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    for _ in range(2):  # what is slow the first time does not count
        seconds = opsd_step(run, examples()[:5], 1).clock.seconds()
    assert list(seconds) == phases
    if not joint:
        assert seconds["teacher"] > 0.4 > 2 * seconds["student"]  # in two micro-batches
    assert not student.model._forward_pre_hooks


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_keeps_the_students_gradient(fixed_rollouts, packed):
    """A weight that the teacher's pass casts without a gradient must not be taken from the cache by the student's."""
    student = model()
    options = {"teacher__kind": "live", "rollout__importance_cap": 5.0, "packed": packed}
    _, expected = gradients(student, **options)
    _, actual = gradients(student, **options, model__autocast="bfloat16")
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-4
        assert (actual[name] - gradient).norm() < 0.2 * gradient.norm(), name


def test_supervised_loss_is_cross_entropy():
    student = model().double().eval()
    prompts = [example.student for example in examples()]
    loss = supervised_loss(student, prompts, ROLLOUTS, denominator=7)
    expected = 0.0
    for prompt, completion in zip(prompts, ROLLOUTS, strict=True):
        logits = student(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum")
    torch.testing.assert_close(loss, expected / 7, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_adapters_get_the_gradient_of_the_padded_ones(fixed_rollouts, checkpointing):
    gradients = []
    for packed in (False, True):
        adapted = lora(model().double())
        if checkpointing:  # then both contexts go through the model at once
            adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.train()
        joint = packed and checkpointing
        opsd_step(dataclasses.replace(run_of(adapted), packed=packed, joint=joint), examples(), 1)
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert any(g.abs().max() > 1e-4 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_base_teacher_of_adapters_is_the_model_before_training(fixed_rollouts):
    plain = model().double().eval()
    adapted = lora(model().double())  # adapters that already change the output
    run = run_of(adapted)
    prompts = [example.teacher for example in examples()]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for number in (1, 2):
        opsd_step(run, examples(), number)
        optimizer.step()
    teacher = run.teacher.hidden(prompts, ROLLOUTS)
    torch.testing.assert_close(teacher, rollout_hidden(plain, prompts, ROLLOUTS), rtol=1e-12, atol=1e-12)
    assert not teacher.requires_grad
    assert not torch.allclose(rollout_hidden(adapted, prompts, ROLLOUTS), teacher, atol=1e-3)
    assert all(p.requires_grad for n, p in adapted.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("kind", ["base", "live"])
def test_teacher_has_no_dropout_and_no_gradient(kind):
    student = model("gpt2", resid_pdrop=0.5).train()
    teacher = run_of(student, teacher__kind=kind).teacher
    prompts = [example.teacher for example in examples()]
    first = teacher.hidden(prompts, ROLLOUTS)
    assert torch.equal(first, teacher.hidden(prompts, ROLLOUTS))
    assert not first.requires_grad
    assert student.training
    assert all(m.training for m in student.modules())


def test_head_is_shared_only_where_it_is_the_same(monkeypatch, fixed_rollouts):
    import opsd.recipes.divergence as room

    seen = []
    real = room.jsd_loss
    monkeypatch.setattr(room, "jsd_loss", lambda *a, **k: seen.append("teacher_weight" in k) or real(*a, **k))
    for student, kind, separate in ((model(), "live", False), (model(), "base", True), (lora(model()), "base", False)):
        opsd_step(run_of(student, teacher__kind=kind), examples(), 1)
        assert set(seen) == {separate}
        seen.clear()


def test_gradient_checkpointing_changes_nothing(fixed_rollouts):
    student = model().double()
    _, expected = gradients(student)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.zero_grad()
    run = run_of(student)
    run.model.train()
    opsd_step(run, examples(), 1)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_groups_hold_every_rollout_once_longest_first():
    assert group_rollouts([3, 9, 1, 5, 7], 2) == [[1, 4], [3, 0], [2]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [[3], [2], [4], [5], [1], [0]]),
        (3, [[3, 2], [4, 5], [1, 0]]),
        (4, [[3, 2, 4, 5], [1, 0]]),
        (100, [[3, 2, 4, 5, 1, 0]]),
    ],
)
def test_groups_keep_the_rollouts_of_a_prompt_together(size, expected):
    assert group_rollouts([3, 4, 5, 9, 8, 1], size, together=2) == expected


@pytest.mark.parametrize("recipe", ["gkd", "sdft", "opd_plus", "distil"])
def test_a_recipe_of_the_family_in_the_loop(fixed_rollouts, recipe):
    """Its loss is the mean of the token losses whatever the micro-batches; GKD's is that of the loop's own JSD."""
    student = model("qwen3").double()
    whole, expected = gradients(student, objective__recipe=recipe, optim__micro_batch_size=5)
    parts, actual = gradients(student, objective__recipe=recipe, optim__micro_batch_size=1)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=1e-9)
    same_gradients(actual, expected)
    if recipe == "gkd":
        own, actual = gradients(student)
        torch.testing.assert_close(own.loss, whole.loss, rtol=1e-6, atol=1e-9)
        same_gradients(actual, expected)
        assert {"divergence", "student_entropy", "sampler_mismatch"} <= whole.metrics.keys()


@pytest.mark.parametrize("per_prompt", [1, 3])
@pytest.mark.parametrize(("name", "kind"), [("purified", "base"), ("ar_opd", "ema"), ("edge_opd", "base")])
def test_a_recipe_of_several_contexts_in_the_loop(fixed_rollouts, name, kind, per_prompt):
    """The mean of its token losses of the rows that single passes over each context's own prompt give."""
    student = model("qwen3").double()
    options = {"objective__recipe": name, "teacher__kind": kind, "rollout__per_prompt": per_prompt}
    run = run_of(student, optim__micro_batch_size=100, **options)
    others = {"base": 1, "plain": 2, "reference": 3, "partial": 4}  # a seed for the prompts of each
    own = {c: [e.teacher for e in examples(seed=seed)] for c, seed in others.items() if c in run.recipe.contexts}
    chosen = [dataclasses.replace(e, contexts={c: ids[i] for c, ids in own.items()}) for i, e in enumerate(examples())]
    written = fixed(per_prompt)
    repeated = [e for e in chosen for _ in range(per_prompt)]
    ids = [rollout.ids for rollout in written]
    rows = rollout_hidden(student, [e.student for e in repeated], ids)
    teachers = {c: rollout_hidden(student, [e.read_as(c) for e in repeated], ids).detach() for c in run.recipe.contexts}
    targets, sequences = rollout_index(ids, rows.device)
    batch = recipes.TokenBatch(target_ids=targets, sequence_ids=sequences)
    teachers = {c: stream_of(hidden, run.head) for c, hidden in teachers.items()}
    losses, _ = recipes.make(name).token_loss(stream_of(rows, run.head), teachers, batch)
    student.zero_grad()
    losses.mean().backward()
    expected = {n: p.grad.clone() for n, p in student.named_parameters()}
    for packed, size in ((False, 100), (True, 100), (True, 2)):
        student.zero_grad()
        run = dataclasses.replace(run_of(student, optim__micro_batch_size=size, **options), packed=packed)
        run.model.eval()
        result = opsd_step(run, chosen, 1)
        torch.testing.assert_close(result.loss, losses.mean().detach().to(result.loss), rtol=1e-5, atol=1e-8)
        same_gradients({n: p.grad for n, p in student.named_parameters()}, expected)


@pytest.mark.parametrize(("options", "said"), [
    ({"objective__recipe": "opd"}, "recipe is 'opd'; accepted: act_guide"),
    ({"objective__recipe": "pbsd"}, "'preferred', which the training loop does not supply .rollouts of the teacher"),
    ({"objective__recipe": "cepo"}, "rollout.per_prompt must be at least 2"),
    ({"objective__recipe": "credit", "optim__batch_size": 1}, "optim.batch_size must be at least 2, not 1"),
    ({"prompts__contexts": '{"teacher": "right_rollout"}'}, "rollout.per_prompt is 1, but a context reads another"),
    ({"objective__recipe": "purified", "teacher__kind": "live"}, "the initial model: teacher.kind must be 'base', not"),
    ({"objective__recipe": "ta_opd"}, "optim.micro_batch_size must be at least 32, optim.batch_size times"),
    ({"objective__recipe": "opsd", "objective__recipe_options": "[1]"}, "accepted: a JSON object"),
    ({"objective__recipe": "opsd", "objective__recipe_options": '{"tau": 1}'}, "no option 'tau'; accepted: "),
    ({"objective__recipe": "opsd", "objective__recipe_options": '{"beta": 2}'}, "beta is 2; accepted: "),
])  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        run_of(model(), **options)
