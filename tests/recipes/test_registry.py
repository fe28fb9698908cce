"""The family by name: what is there, what each needs, and what is refused. And identities between recipes."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import opsd_kernels
from benchmarks.recipes import table
from opsd import recipes
from opsd.cli import main

NAMES = [
    "opsd",
    "gkd",
    "sdft",
    "sdpo",
    "purified",
    "ar_opd",
    "nca",
    "mad_opd",
    "rgsd",
    "vpd",
    "rock",
    "msd",
    "pi_play",
    "oprd",
    "distil",
    "lightning",
    "opd_plus",
    "edge_opd",
    "ta_opd",
    "rlsd",
    "cepo",
    "rlrt",
    "egrsd",
    "cl_egrsd",
    "anti_sd",
    "credit",
    "copd",
    "temporal",
    "npo",
    "pbsd",
    "spear",
    "omni_opd",
    "zppo",
    "act_guide",
    "d_opsd",
    "tad",
]
IDS = torch.tensor([4, 4, 4, 1, 1, 1, 1, 1])
ROWS, HIDDEN, VOCABULARY = len(IDS), 6, 37


def stream(seed, weight=None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator)
    if weight is None:
        weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    return opsd_kernels.Stream(hidden, weight)


def whole_batch():
    generator = torch.Generator().manual_seed(5)

    def rand():
        return torch.rand(ROWS, dtype=torch.float64, generator=generator)

    kinds = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()
    student = torch.randn(ROWS, 5, dtype=torch.float64, generator=generator).requires_grad_()
    return recipes.TokenBatch(
        target_ids=torch.randint(VOCABULARY, (ROWS,), generator=generator),
        sequence_ids=IDS,
        sampler_logprobs=-rand() * 3,
        advantage=rand() * 2 - 1,
        correct=kinds,
        has_feedback=kinds,
        reference_logprobs=-rand() * 3,
        teacher_logprobs=-rand() * 3,
        confidence=torch.stack([rand() * 100, rand() * 100], 1),
        chunk_score=rand(),
        is_cross=kinds,
        preferred=kinds,
        pair_ids=torch.zeros(ROWS, dtype=torch.int64),
        decoded=kinds,
        near=rand(),
        layers=[(student, student.detach() + 1, 0.5)],
        progress=0.3,
        step=5,
        discrepancy_std=1.0,
        warmup_perplexity=1.5,
    )


def run(recipe, batch, **teachers):
    """Losses, statistics and the gradient of the losses' sum to the student's rows."""
    student = stream(1)
    student.hidden.requires_grad_()
    given = {name: teachers.get(name, stream(10 + i, student.weight)) for i, name in enumerate(recipe.contexts)}
    losses, stats = recipe.token_loss(student, given, batch)
    losses.sum().backward()
    return losses.detach(), stats, student.hidden.grad


def test_the_names_are_these():
    assert recipes.names() == sorted(NAMES)
    assert set(recipes.FORMS) == {"full", "sampled_token"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_gives_a_loss_of_each_token_from_what_it_says_it_needs(name):
    recipe, everything = recipes.make(name), whole_batch()
    assert recipe.source.partition(":")[0] in ("primary", "notes", "secondary", "unsettled")
    assert type(recipe).__doc__ != recipes.TokenRecipe.__doc__
    assert recipe.paper == "" or recipe.paper in type(recipe).__doc__ or name == "cl_egrsd"
    batch = recipes.TokenBatch(
        target_ids=everything.target_ids,
        sequence_ids=IDS,
        **{field: getattr(everything, field) for field in recipe.needs},
    )
    losses, stats, gradient = run(recipe, batch)
    assert losses.shape == (ROWS,)
    assert losses.dtype == torch.float64
    assert losses.isfinite().all()
    assert all(value.shape == (ROWS,) and not value.requires_grad for value in stats.values()), stats
    if name == "oprd":
        torch.testing.assert_close(losses, torch.full_like(losses, 0.5))
        assert batch.layers[0][0].grad.abs().sum() > 0
    else:
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    if "mask" in stats:
        assert losses[~stats["mask"]].abs().sum() == 0

    for field in recipe.needs:
        with pytest.raises(ValueError, match=f"batch.{field} is None; {type(recipe).__name__} needs it"):
            run(recipe, dataclasses.replace(batch, **{field: None}))
        if isinstance(getattr(batch, field), torch.Tensor):
            with pytest.raises(ValueError, match=rf"batch.{field} is of shape \(7,.*accepted: .*\(8"):
                run(recipe, dataclasses.replace(batch, **{field: getattr(batch, field)[1:]}))
    if recipe.contexts:
        with pytest.raises(ValueError, match=f"teachers has no '{recipe.contexts[0]}'"):
            recipe.token_loss(stream(1), {}, batch)


@pytest.mark.parametrize(("name", "options", "said"), [
    ("opds", {}, "recipe is 'opds'; accepted: act_guide, anti_sd"),
    ("opsd", {"limit": 1}, "recipe opsd has no option 'limit'; accepted: backend, workspace_bytes, beta"),
    ("opsd", {"beta": 1.5}, "beta is 1.5; accepted: number from 0 to 1"),
    ("opsd", {"beta": True}, "beta is True; accepted: number from 0 to 1"),
    ("opsd", {"beta": math.nan}, "beta is nan; accepted"),
    ("opsd", {"entry_clip": 0}, "entry_clip is 0; accepted: number > 0 or None"),
    ("opsd", {"backend": "tpu"}, "backend is 'tpu'; accepted: 'auto', 'torch'"),
    ("sdpo", {"ratio_cap": None}, "ratio_cap is None; accepted: number > 0"),
    ("rock", {"ids": [1]}, r"ids is \[1\]; accepted: tuple of token ids"),
    ("ta_opd", {"top_k": 0}, "top_k is 0; accepted: integer >= 1"),
    ("ta_opd", {"low_quantile": 0.95}, "low_quantile is 0.95; accepted: below high_quantile"),
    ("zppo", {"clip_low": 0.2}, "clip_low is 0.2; accepted: None without ratio"),
    ("temporal", {"first": "middle"}, "first is 'middle'; accepted: 'late', 'early'"),
])  # fmt: skip
def test_unknown_recipes_and_unfit_options_are_named(name, options, said):
    with pytest.raises(ValueError, match=said):
        recipes.make(name, **options)


def same(first, second, what="both"):
    """Whether two (losses, stats, gradient) agree, in losses and gradient or the gradient alone."""
    if what == "both":
        torch.testing.assert_close(first[0], second[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(first[2], second[2], atol=1e-10, rtol=1e-10)


def advantage_alone(batch):
    return run(recipes.make("zppo"), batch)


@pytest.mark.parametrize(("name", "options"), [
    ("rlsd", {"coefficient": 0}),
    ("cepo", {"coefficient": 0}),
    ("rlrt", {"coefficient": 0}),
    ("anti_sd", {"coefficient": 0}),
    ("anti_sd", {"coefficient": 0, "scope": "batch"}),
    ("anti_sd", {"coefficient": 0, "plain": True}),
    ("egrsd", {"coefficient": 0, "clip": 1e-300}),
    ("temporal", {"start": 1}),
    ("act_guide", {}),
])  # fmt: skip
def test_without_its_teacher_a_recipe_is_the_policy_gradient(name, options):
    batch = whole_batch()
    same(run(recipes.make(name, **options), batch), advantage_alone(batch))


def test_rewards_spread_by_a_teacher_equal_to_the_student_are_the_policy_gradient():
    batch = whole_batch()
    same(run(recipes.make("rlsd"), batch, teacher=stream(1)), advantage_alone(batch))
    same(run(recipes.make("rlrt"), batch, teacher=stream(1)), advantage_alone(batch))
    same(run(recipes.make("cepo"), batch, positive=stream(2), negative=stream(2)), advantage_alone(batch))


def test_progress_one_is_the_policy_gradient_and_a_start_keeps_the_chosen_end():
    batch = whole_batch()
    for curve in ("linear", "sigmoid", "gamma"):
        done = dataclasses.replace(batch, progress=1.0)
        same(run(recipes.make("temporal", curve=curve), done), advantage_alone(done))
    begun = dataclasses.replace(batch, progress=0.0)
    for first, kept in (("late", [2, 6, 7]), ("early", [0, 3, 4])):
        stats = run(recipes.make("temporal", start=0.4, first=first), begun)[1]
        assert stats["reached"].nonzero().flatten().tolist() == kept


def test_ratio_to_the_student_itself_is_the_policy_gradient():
    batch = whole_batch()
    own = opsd_kernels.logprob(stream(1), batch.target_ids)
    own_batch = dataclasses.replace(batch, sampler_logprobs=own)
    same(run(recipes.make("npo"), own_batch), advantage_alone(batch), "gradient")
    clipped = run(
        recipes.make("npo", clip_low=0.2, clip_high=0.28), dataclasses.replace(batch, sampler_logprobs=own - 1)
    )
    assert (clipped[2][batch.advantage > 0] == 0).all()
    assert (clipped[2][batch.advantage < 0] != 0).any(1).all()


def test_equal_contexts_remove_the_divergences():
    for name in ("opsd", "gkd", "sdft", "sdpo", "rock", "msd", "d_opsd"):
        losses, _, gradient = run(recipes.make(name), whole_batch(), teacher=stream(1))
        assert losses.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-12


def test_composed_targets_collapse_as_they_should():
    batch = whole_batch()
    a, b = stream(20), stream(21)
    plain = {teacher: run(recipes.make("gkd"), batch, teacher=stream(teacher)) for teacher in (20, 21)}
    forward = {teacher: run(recipes.make("gkd", beta=0), batch, teacher=stream(teacher)) for teacher in (20, 21)}
    same(run(recipes.make("purified"), batch, teacher=a, reference=a, base=b), plain[21])
    same(run(recipes.make("ar_opd", coefficient=0), batch, teacher=a, partial=b), forward[21])
    same(run(recipes.make("ar_opd", coefficient=1, clip=None), batch, teacher=a, partial=b), forward[20])
    nca = run(recipes.make("nca", coefficient=0), batch, teacher=a, privileged_student=b)
    same(nca, run(recipes.make("sdft"), batch, teacher=a))
    same(run(recipes.make("mad_opd"), batch, teacher_1=a, teacher_2=a), plain[20])


def test_a_missing_teacher_leaves_its_weight_to_the_other():
    confidence = torch.tensor([[50.0, -math.inf]], dtype=torch.float64).repeat(ROWS, 1)
    batch = dataclasses.replace(whole_batch(), confidence=confidence)
    for beta in (0.5, 1):
        got = run(recipes.make("mad_opd", beta=beta), batch, teacher_1=stream(20), teacher_2=stream(21))
        same(got, run(recipes.make("gkd", beta=beta), batch, teacher=stream(20)))


def test_the_debate_at_beta_one_has_the_gradient_of_its_sum():
    batch = whole_batch()
    mixed = run(recipes.make("mad_opd", beta=1), batch, teacher_1=stream(20), teacher_2=stream(21))
    summed = run(recipes.make("mad_opd", beta=1, top_k=VOCABULARY), batch, teacher_1=stream(20), teacher_2=stream(21))
    same(mixed, summed, "gradient")
    assert (mixed[0] < summed[0]).all()


def test_nca_reaches_the_student_that_reads_the_context():
    student, read = stream(1), stream(2)
    read.hidden.requires_grad_()
    losses, _ = recipes.make("nca").token_loss(
        student, {"teacher": stream(3), "privileged_student": read}, whole_batch()
    )
    losses.sum().backward()
    expected = torch.autograd.grad(opsd_kernels.divergence(read, student, beta=0.0)[0].sum(), read.hidden)[0]
    torch.testing.assert_close(read.hidden.grad, expected)


def test_distil_without_its_second_term_is_forward_kl_in_the_gradient():
    batch = whole_batch()
    got = run(recipes.make("distil", coefficient=0), batch)
    same(got, run(recipes.make("gkd", beta=0), batch), "gradient")
    full = run(recipes.make("distil"), batch)
    ce = full[0].clone()
    for row in reversed(range(ROWS)):
        later = sum(float(got[0][i]) for i in range(row + 1, ROWS) if IDS[i] == IDS[row])
        ce[row] = got[0][row] + later * full[1]["student_logprob"][row]
    torch.testing.assert_close(full[0], ce)


def test_a_pair_of_the_same_rollout_has_loss_ln_2_and_no_gradient():
    ids = torch.tensor([3, 7, 5, 2, 3, 7, 5, 2])
    half = torch.arange(ROWS) < 4
    rows = torch.randn(4, HIDDEN, dtype=torch.float64).repeat(2, 1)
    weight = stream(1).weight.clone().requires_grad_()
    batch = recipes.TokenBatch(
        target_ids=ids,
        sequence_ids=(~half).long(),
        reference_logprobs=torch.linspace(-3, -1, 4, dtype=torch.float64).repeat(2),
        pair_ids=torch.zeros(ROWS, dtype=torch.int64),
        preferred=half,
    )
    losses, _ = recipes.make("pbsd").token_loss(opsd_kernels.Stream(rows, weight), {}, batch)
    losses.sum().backward()
    assert float(losses.sum()) == pytest.approx(math.log(2))
    assert weight.grad.abs().max() < 1e-15
    with pytest.raises(ValueError, match="accepted: a preferred and another one"):
        recipes.make("pbsd").token_loss(
            opsd_kernels.Stream(rows, weight), {}, dataclasses.replace(batch, preferred=torch.ones(ROWS))
        )


def test_spear_without_wrong_rollouts_is_the_likelihood():
    batch = dataclasses.replace(whole_batch(), correct=torch.ones(ROWS))
    losses = run(recipes.make("spear"), batch)[0]
    torch.testing.assert_close(losses, -opsd_kernels.logprob(stream(1), batch.target_ids))
    tail = run(recipes.make("spear"), dataclasses.replace(batch, correct=torch.zeros(ROWS)))[1]["tail"]
    assert tail.nonzero().flatten().tolist() == [7]


def test_sdpo_masks_rollouts_without_feedback_and_caps_the_ratio():
    batch = whole_batch()
    own = opsd_kernels.logprob(stream(1), batch.target_ids)
    plain = run(recipes.make("gkd"), batch)
    on_policy = dataclasses.replace(batch, sampler_logprobs=own, has_feedback=torch.ones(ROWS))
    same(run(recipes.make("sdpo", top_k=None, tail_bucket=False), on_policy), plain)
    far = dataclasses.replace(on_policy, sampler_logprobs=own - 9, old_logprobs=own - 0.5)
    weight = run(recipes.make("sdpo"), far)[1]["weight"]
    torch.testing.assert_close(weight, torch.full_like(weight, 2 * math.exp(0.5)))


def test_anti_sd_falls_silent_in_the_warm_up_and_where_its_gate_is_shut():
    batch = whole_batch()
    warming = dataclasses.replace(batch, discrepancy_std=math.inf, warmup_perplexity=math.inf)
    same(run(recipes.make("anti_sd"), warming), advantage_alone(batch))
    loud = {"highest_perplexity": math.inf}
    assert (run(recipes.make("anti_sd", **loud), batch)[1]["strength"] > 0).all()
    shut = dataclasses.replace(batch, gate_open=False, warmup_perplexity=1e9)
    assert not run(recipes.make("anti_sd", scope="batch", **loud), shut)[1]["gate_open"].any()
    assert run(recipes.make("anti_sd", scope="batch", **loud), dataclasses.replace(batch, gate_open=False))[1][
        "gate_open"
    ].all()


def test_edge_with_a_live_teacher_needs_no_stream_of_its_own_prompt():
    live = run(recipes.make("edge_opd", live_teacher=True), whole_batch(), teacher=stream(20), base=stream(22))
    given = run(recipes.make("edge_opd"), whole_batch(), teacher=stream(20), plain=stream(1), base=stream(22))
    same(live, given)
    assert (given[1]["weight"] == 0).any()
    assert (given[1]["weight"] > 0).any()


def test_the_readme_lists_the_recipes_as_they_are():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"<!-- recipes -->\n{table()}\n<!-- /recipes -->" in readme


def test_the_command_lists_each_with_what_it_needs(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name}  (" in f"\n{shown}" for name in recipes.names())
    assert "reads teacher, reference, base; in the loop too" in shown
    assert "reads positive, negative; in the loop too" in shown
    assert "the loop has no 'layers' (hidden states of inner layers, which a packed pass does not keep)" in shown
    assert main(["recipes", "more"]) == 2
