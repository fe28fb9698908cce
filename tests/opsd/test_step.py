import dataclasses
import math

import pytest
import torch
from _models import examples, lora, model, run_of

from opsd.rollouts import Rollout
from opsd.scoring import rollout_hidden, rollout_index
from opsd.step import micro_batches, opsd_step, supervised_loss

ROLLOUTS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 14, 1], [15], [16, 17, 18]]


@pytest.fixture
def fixed_rollouts(monkeypatch):
    """Rollouts of given ids, so that what is compared is scoring alone."""
    monkeypatch.setattr("opsd.step.sample", lambda *_: [Rollout(ids, ids[-1] != 1) for ids in ROLLOUTS])


def gradients(student, **options):
    student.zero_grad()
    run = run_of(student, **options)
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


@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("form", ["full", "sampled_token"])
@pytest.mark.parametrize("adapted", [False, True])
def test_micro_batch_size_does_not_change_loss_gradient_or_metrics(fixed_rollouts, form, reduction, adapted):
    student = model("qwen3").double()
    student = lora(student) if adapted else student
    options = {"objective__form": form, "objective__reduction": reduction}
    whole, expected = gradients(student, **options, optim__micro_batch_size=5)
    assert max(g.abs().max() for g in expected.values()) > 1e-6
    for size in (1, 2, 4):
        result, actual = gradients(student, **options, optim__micro_batch_size=size)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(result.loss, whole.loss, rtol=1e-9, atol=1e-12)
        for name, value in whole.metrics.items():
            assert math.isclose(float(result.metrics[name]), float(value), rel_tol=1e-9, abs_tol=1e-12), name


def dense_loss(student, teacher, reduction, form, beta):
    """The definition, one sequence at a time, with full logits."""
    per_sequence = []
    for example, rollout in zip(examples(), ROLLOUTS, strict=True):

        def logp(m, prompt, rollout=rollout):
            return m(torch.tensor([prompt + rollout])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

        s = logp(student, example.student)
        with torch.no_grad():
            t = logp(teacher, example.teacher)
        if form == "full":
            m = ((1 - beta) * s.exp() + beta * t.exp()).log()
            tokens = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
        else:
            at = torch.tensor(rollout)[:, None]
            s, t = s.gather(-1, at)[:, 0], t.gather(-1, at)[:, 0]
            tokens = -(t - s).detach() * s
        per_sequence.append(tokens)
    if reduction == "mean":
        return torch.cat(per_sequence).mean()
    return torch.stack([tokens.mean() for tokens in per_sequence]).mean()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("form", ["full", "sampled_token"])
@pytest.mark.parametrize("kind", ["base", "live"])
def test_step_is_the_definition(fixed_rollouts, form, reduction, kind, packed):
    student = model().double().eval()
    run = run_of(student, teacher__kind=kind, objective__form=form, objective__reduction=reduction)
    run = dataclasses.replace(run, packed=packed)
    with torch.no_grad():  # as after some training: a frozen copy must not follow
        initial = model(seed=0).double().eval()
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    result = opsd_step(run, examples(), 1)
    actual = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    loss = dense_loss(student, initial if kind == "base" else student, reduction, form, beta=0.5)
    loss.backward()
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-7, atol=1e-10)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-6, atol=1e-9)


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
        opsd_step(dataclasses.replace(run_of(adapted), packed=packed), examples(), 1)
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
    import opsd.step

    seen = []
    real = opsd.step.jsd_loss
    monkeypatch.setattr(opsd.step, "jsd_loss", lambda *a, **k: seen.append("teacher_weight" in k) or real(*a, **k))
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


def test_micro_batches_hold_every_rollout_once_longest_first():
    chosen = micro_batches([3, 9, 1, 5, 7], 2)
    assert chosen == [[1, 4], [3, 0], [2]]
