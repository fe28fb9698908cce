"""Every recipe's losses and gradient against its dense transcription, and the identities that define it."""

import functools
from dataclasses import fields, replace

import dense
import pytest
import torch
from _helpers import leaf

from opsd.recipes import TokenBatch, make, names
from opsd_kernels import Stream

N, V, H = 11, 50, 8
SEQUENCES = torch.tensor([4, 4, 4, 4, 0, 0, 0, 9, 9, 2, 2])


def random(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@functools.cache
def batch():
    """Every field that a recipe may read."""
    g = torch.Generator().manual_seed(5)
    of_sequence = {4: 0, 0: 1, 9: 2, 2: 3}
    which = torch.tensor([of_sequence[i] for i in SEQUENCES.tolist()])

    def of_each(*values):
        return torch.tensor(values)[which]

    def logs(seed):
        return -random(seed, N).abs() - 1.5

    return TokenBatch(
        target_ids=torch.randint(V, (N,), generator=g),
        sequence_ids=SEQUENCES,
        sampler_logprobs=logs(10),
        token_weight=random(11, N).abs(),  # the caller's, no recipe's
        advantage=of_each(1.3, -0.7, 0.4, -1.1).double() + random(12, N, scale=0.05),
        correct=of_each(False, True, True, False),
        has_feedback=of_each(True, True, False, True),
        old_logprobs=logs(13),
        reference_logprobs=logs(14),
        teacher_logprobs=logs(15),
        confidence=torch.tensor([80.0, 30.0]).double() + random(16, N, 2, scale=10.0),
        chunk_score=of_each(0.9, -0.3, 0.2, 0.5).double(),
        is_cross=of_each(False, True, False, True),
        preferred=of_each(True, False, False, True),
        pair_ids=of_each(6, 6, 5, 5),
        decoded=torch.arange(N) % 3 == 0,
        near=torch.linspace(0, 1, N, dtype=torch.float64),
        layers=[(random(17, N, 6), random(18, N, 6), 1.0), (random(19, N, 9), random(20, N, 9), 0.5)],
        progress=0.4,
        step=7,
        discrepancy_std=0.8,
        warmup_perplexity=1.5,
        gate_open=True,
    )


def streams(recipe, *, shared=True):
    """The student, and a stream near it for each context; NCA's second student has a gradient."""
    weight = random(1, V, H)
    rows = random(2, N, H, scale=0.8)
    student = Stream(leaf(rows), weight)
    teachers = {}
    for i, name in enumerate(recipe.contexts):
        hidden = rows + random(30 + i, N, H, scale=0.3)
        head = weight if shared else weight + random(40 + i, V, H, scale=0.1)
        teachers[name] = Stream(leaf(hidden) if name == "privileged_student" else hidden, head)
    return student, teachers


def result(recipe, student, teachers, b):
    """Losses, and the gradients of every row that has one, for an uneven weighting of the tokens."""
    losses, stats = recipe.token_loss(student, teachers, b)
    assert losses.shape == (N,)
    assert all(not value.requires_grad for value in stats.values())
    return losses.detach(), gradients(losses, student, teachers, b)


def gradients(losses, student, teachers, b):
    leaves = [s.hidden for s in (student, *teachers.values()) if s.hidden.requires_grad]
    if not losses.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad((losses * random(3, N)).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def close(got, wanted):
    """Both (losses, gradients)."""
    torch.testing.assert_close(got[0], wanted[0], rtol=3e-8, atol=1e-12)  # a schedule is in float32
    for one, other in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=3e-8, atol=1e-8)


def plain(function, **options):
    return lambda s, t, b: function(s, t["teacher"], **options)


def sampled(function, *more, **options):
    return lambda s, t, b: function(s, t["teacher"], b.target_ids, *(getattr(b, name) for name in more), **options)


ADVANTAGE = ("advantage",)
IDS = (3, 7, 11, 20, 21, 34)
CASES = [
    ("opsd", {}, plain(dense.opsd, beta=0.5, entry_clip=0.05)),
    ("opsd", {"beta": 0.0, "entry_clip": 0.02}, plain(dense.opsd, beta=0.0, entry_clip=0.02)),
    ("gkd", {}, plain(dense.opsd, beta=0.5)),
    ("gkd", {"beta": 0.3}, plain(dense.opsd, beta=0.3)),
    ("sdft", {}, plain(dense.opsd, beta=1.0)),
    ("vpd", {}, plain(dense.opsd, beta=1.0)),
    ("pi_play", {}, plain(dense.opsd, beta=1.0)),
    ("rgsd", {}, plain(dense.opsd, beta=0.5, entry_clip=0.05)),
    (
        "sdpo",
        {"top_k": 9},
        lambda s, t, b: dense.sdpo(
            s, t["teacher"], b.target_ids, b.old_logprobs, b.has_feedback, sampler=b.sampler_logprobs, top_k=9
        ),
    ),
    ("purified", {}, lambda s, t, b: dense.purified(s, t["teacher"], t["reference"], t["base"])),
    ("purified", {"limit": 0.7}, lambda s, t, b: dense.purified(s, t["teacher"], t["reference"], t["base"], limit=0.7)),
    ("ar_opd", {}, lambda s, t, b: dense.ar_opd(s, t["teacher"], t["partial"])),
    ("ar_opd", {"clip": 0.4}, lambda s, t, b: dense.ar_opd(s, t["teacher"], t["partial"], clip=0.4)),
    ("nca", {"top_k": 12, "coefficient": 0.3}, lambda s, t, b: dense.nca(
        s, t["teacher"], t["privileged_student"], coefficient=0.3, top_k=12)),
    ("mad_opd", {}, lambda s, t, b: dense.mad_opd(s, [*t.values()], b.confidence)),
    ("mad_opd", {"top_k": 8, "beta": 1.0, "temperature": 0.3}, lambda s, t, b: dense.mad_opd(
        s, [*t.values()], b.confidence, beta=1.0, temperature=0.3, top_k=8)),
    ("rock", {"ids": IDS}, lambda s, t, b: dense.rock(s, t["teacher"], b.target_ids, torch.tensor(IDS))),
    ("msd", {}, sampled(dense.msd)),
    ("oprd", {}, lambda s, t, b: dense.oprd(b.layers, b.sequence_ids)),
    ("oprd", {"last": 2}, lambda s, t, b: dense.oprd(b.layers, b.sequence_ids, last=2)),
    ("distil", {}, sampled(dense.distil, "sequence_ids")),
    ("d_opsd", {}, lambda s, t, b: dense.d_opsd(s, t["teacher"], b.decoded, beta=0.5)),
    ("tad", {}, sampled(dense.tad, "near")),
    ("lightning", {}, lambda s, t, b: dense.lightning(s, b.target_ids, b.teacher_logprobs)),
    ("opd_plus", {}, sampled(dense.opd_plus)),
    ("opd_plus", {"beta": 0.2}, sampled(dense.opd_plus, beta=0.2)),
    ("opd_plus", {"beta": 0.0}, sampled(dense.opd_plus, beta=0.0)),
    ("opd_plus", {"beta": 1.0}, sampled(dense.opd_plus, beta=1.0)),
    ("edge_opd", {}, lambda s, t, b: dense.edge_opd(s, t["teacher"], t["base"], b.target_ids, t_plain=t["plain"])),
    ("edge_opd", {"live_teacher": True}, lambda s, t, b: dense.edge_opd(s, t["teacher"], t["base"], b.target_ids)),
    ("ta_opd", {"share": 0.3}, sampled(dense.ta_opd, "sequence_ids", fraction=0.3)),
    ("ta_opd", {}, sampled(dense.ta_opd, "sequence_ids")),
    ("rlsd", {}, sampled(dense.rlsd, *ADVANTAGE)),
    ("rlsd", {"coefficient": 0.8, "clip": 0.1, "decay_steps": 50}, sampled(
        dense.rlsd, *ADVANTAGE, lam=0.8 * (1 - 7 / 50), clip=0.1)),
    ("cepo", {}, lambda s, t, b: dense.cepo(
        s, t["positive"], t["negative"], b.target_ids, b.advantage, lam=0.5 * (1 - 7 / 25))),
    ("rlrt", {}, sampled(dense.rlrt, "advantage", "correct")),
    ("egrsd", {}, sampled(dense.egrsd, *ADVANTAGE)),
    ("egrsd", {"coefficient": 2.0}, sampled(dense.egrsd, *ADVANTAGE, coefficient=2.0)),  # here the floor acts
    ("cl_egrsd", {}, sampled(dense.egrsd, "advantage", "sequence_ids", window=8)),
    ("credit", {"shuffles": 2}, lambda s, t, b: dense.credit(
        s, t["teacher"], [t["shuffled_1"], t["shuffled_2"]], b.target_ids)),
    ("copd", {"coefficient": 0.7}, sampled(dense.copd, "advantage", "is_cross", coefficient=0.7)),
    ("anti_sd", {"plain": True}, sampled(dense.anti_sd_plain, *ADVANTAGE, lam=0.1)),
    ("anti_sd", {"highest_perplexity": 1e6}, sampled(
        dense.anti_sd, "sequence_ids", "advantage", sigma=0.8, median=1.5, highest=1e6)),
    ("npo", {}, lambda s, t, b: dense.ratio_pg(s, b.target_ids, b.advantage, b.sampler_logprobs)),
    ("zppo", {}, lambda s, t, b: dense.pg(b.advantage, s, b.target_ids)),
    ("act_guide", {}, lambda s, t, b: dense.pg(b.advantage, s, b.target_ids)),
    ("omni_opd", {}, lambda s, t, b: dense.pg(b.chunk_score, s, b.target_ids)),
    ("omni_opd", {"centre": True}, lambda s, t, b: dense.pg(b.chunk_score - b.chunk_score.mean(), s, b.target_ids)),
    ("temporal", {"start": 0.0, "end": 0.8}, lambda s, t, b:
        dense.temporal(s, b.target_ids, b.sequence_ids, b.advantage, share=0.5)),
    ("pbsd", {}, lambda s, t, b: dense.pbsd(s, b.target_ids, b.preferred, b.reference_logprobs, b.pair_ids)),
    ("spear", {}, lambda s, t, b: dense.spear(s, b.target_ids, b.sequence_ids, b.correct)),
]  # fmt: skip


def test_every_recipe_has_a_transcription():
    assert {name for name, _, _ in CASES} == set(names())


@pytest.mark.parametrize("shared", [True, False], ids=["one head", "heads of their own"])
@pytest.mark.parametrize(("name", "options", "formula"), CASES, ids=[f"{name} {options}" for name, options, _ in CASES])
def test_a_recipe_is_its_formula(name, options, formula, shared):
    recipe = make(name, **options)
    student, teachers = streams(recipe, shared=shared)
    s, t = dense.log_p(student), {key: dense.log_p(stream) for key, stream in teachers.items()}
    losses = formula(s, t, batch())
    close(result(recipe, student, teachers, batch()), (losses.detach(), gradients(losses, student, teachers, batch())))


# -- identities -------------------------------------------------------------------------------------------------------


def both(name, other, b=None, *, rows=None, other_rows=None, **options):
    """Two recipes, on the same student and streams; `rows` rename or replace contexts of each: {context: of}."""
    b = b or batch()
    found = []
    for one, own, source in ((name, options.get("first", {}), rows), (other, options.get("second", {}), other_rows)):
        recipe = make(one, **own)
        student, teachers = streams(recipe)
        extra = {
            f"at {i}": Stream(random(2, N, H, scale=0.8) + random(30 + i, N, H, scale=0.3), student.weight)
            for i in range(4)
        }
        if source is not None:
            teachers = {key: {"student": student.detach(), **extra}[source[key]] for key in recipe.contexts}
        found.append(result(recipe, student, teachers, b))
    return found


NOTHING = torch.zeros(N, dtype=torch.bool)
AT_0, STUDENT = {"teacher": "at 0"}, {"teacher": "student"}
SAME = {  # name: the two recipes, and what they are given
    "purified, T = R: the JSD to B": ("purified", "gkd", None, {
        "rows": {"teacher": "at 1", "reference": "at 1", "base": "at 0"}, "other_rows": AT_0}),
    "ar_opd, coefficient 0: OPSD on the part": ("ar_opd", "gkd", None, {
        "rows": {"teacher": "at 1", "partial": "at 0"}, "other_rows": AT_0,
        "first": {"coefficient": 0.0}, "second": {"beta": 0.0}}),
    "ar_opd, coefficient 1 without a clip: OPSD on the whole": ("ar_opd", "gkd", None, {
        "rows": {"teacher": "at 0", "partial": "at 1"}, "other_rows": AT_0,
        "first": {"coefficient": 1.0, "clip": None}, "second": {"beta": 0.0}}),
    "nca, coefficient 0: reverse KL": ("nca", "sdft", None, {
        "rows": {"teacher": "at 0", "privileged_student": "at 1"}, "other_rows": AT_0, "first": {"coefficient": 0.0}}),
    "mad_opd, equal teachers: one": ("mad_opd", "gkd", None, {
        "rows": {"teacher_1": "at 0", "teacher_2": "at 0"}, "other_rows": AT_0}),
    "mad_opd, a missing teacher: the other": ("mad_opd", "gkd", {
        "confidence": torch.tensor([[70.0, -torch.inf]] * N, dtype=torch.float64)}, {
        "rows": {"teacher_1": "at 0", "teacher_2": "at 1"}, "other_rows": AT_0}),
    "rock, no ids: reverse KL": ("rock", "sdft", None, {}),
    "sdft: OPSD at beta 1": ("sdft", "opsd", None, {"second": {"beta": 1.0, "entry_clip": None}}),
    "rlsd, coefficient 0: the advantage": ("rlsd", "zppo", None, {"first": {"coefficient": 0.0}}),
    "rlsd, T = S: the advantage": ("rlsd", "zppo", None, {"rows": STUDENT}),
    "cepo, right = wrong: the advantage": ("cepo", "zppo", None, {"rows": {"positive": "at 0", "negative": "at 0"}}),
    "rlrt, nothing right: the advantage": ("rlrt", "zppo", {"correct": NOTHING}, {}),
    "egrsd, coefficient 0: rlsd with coefficient 1": ("egrsd", "rlsd", None, {
        "first": {"coefficient": 0.0}, "second": {"coefficient": 1.0}}),
    "cl_egrsd, window 1: egrsd": ("cl_egrsd", "egrsd", None, {"first": {"window": 1}}),
    "anti_sd, coefficient 0: the advantage": ("anti_sd", "zppo", None, {"first": {"plain": True, "coefficient": 0.0}}),
    "anti_sd, warm-up: the advantage": ("anti_sd", "zppo", {
        "discrepancy_std": torch.inf, "warmup_perplexity": torch.inf}, {"first": {"highest_perplexity": 1e6}}),
    "temporal, at the end: the advantage": ("temporal", "zppo", {"progress": 1.0}, {}),
    "ta_opd, everything kept: CREDIT's d": ("ta_opd", "credit", None, {
        "first": {"share": 1.0}, "second": {"coefficient": 0.0}}),
    "credit, the same prompt: d": ("credit", "ta_opd", None, {
        "rows": {"teacher": "at 0", "shuffled_1": "at 0"}, "other_rows": AT_0, "second": {"share": 1.0}}),
    "copd, nothing of the other branch: the advantage": ("copd", "zppo", {"is_cross": NOTHING}, {}),
    "copd, everything of the other: d": ("copd", "ta_opd", {"is_cross": ~NOTHING}, {"second": {"share": 1.0}}),
    "spear, all right: NLL": ("spear", "zppo", {
        "correct": ~NOTHING, "advantage": torch.ones(N, dtype=torch.float64)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAME))
def test_two_recipes_are_the_same(name):
    first, second, changes, options = SAME[name]
    one, other = both(first, second, replace(batch(), **(changes or {})), **options)
    assert one[0].abs().max() > 1e-3
    close((one[0], one[1][:1]), (other[0], other[1][:1]))


@pytest.mark.parametrize("name", ["opsd", "gkd", "sdft", "vpd", "pi_play", "rgsd", "sdpo", "rock", "msd", "d_opsd"])
def test_a_teacher_like_the_student_teaches_nothing(name):
    recipe = make(name)
    student, _ = streams(recipe)
    losses, (gradient,) = result(recipe, student, {"teacher": student.detach()}, batch())
    assert losses.abs().max() < 1e-13
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["copd", "ta_opd"])
def test_a_teacher_like_the_student_has_no_sampled_token_weight(name):
    recipe = make(name)
    student, _ = streams(recipe)
    losses, (gradient,) = result(recipe, student, {"teacher": student.detach()}, replace(batch(), is_cross=~NOTHING))
    assert losses.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_sdpo_without_a_cap_at_work_is_the_jsd():
    """Old and sampling model = current model, the whole vocabulary, all with feedback."""
    recipe = make("sdpo", top_k=None, tail_bucket=False)
    student, teachers = streams(recipe)
    now = dense.at(dense.log_p(student.detach()), batch().target_ids)
    b = replace(batch(), old_logprobs=now, sampler_logprobs=now, has_feedback=~NOTHING)
    close(result(recipe, student, teachers, b), result(make("gkd"), student, teachers, b))


def test_lightning_with_the_live_teachers_log_probabilities_is_ta_opd_of_all_tokens():
    recipe = make("ta_opd", share=1.0)
    student, teachers = streams(recipe)
    b = replace(batch(), teacher_logprobs=dense.at(dense.log_p(teachers["teacher"]), batch().target_ids))
    close(result(make("lightning"), student, {}, b), result(recipe, student, teachers, b))


def test_distil_without_its_second_term_has_the_gradient_of_forward_kl():
    recipe = make("distil", coefficient=0.0)
    student, teachers = streams(recipe)
    forward = result(make("gkd", beta=0.0), student, teachers, batch())
    assert (result(recipe, student, teachers, batch())[1][0] - forward[1][0]).abs().max() < 1e-11


def test_mad_opd_of_reverse_kls_has_the_gradient_of_their_sum():
    recipe = make("mad_opd", beta=1.0)
    student, teachers = streams(recipe)
    losses, gradient = result(recipe, student, teachers, batch())
    s, ts = dense.log_p(student), [dense.log_p(t) for t in teachers.values()]
    w = torch.softmax(batch().confidence / 100, -1)
    mixed = dense.div(s, dense.mixture(linear=[(w[:, k], t) for k, t in enumerate(ts)]), 1)
    wanted = gradients(dense.mad_opd(s, ts, batch().confidence, beta=1.0), student, teachers, batch())
    close((losses, gradient), (mixed.detach(), wanted))


def test_rlrt_and_rlsd_without_clips_undo_each_other():
    """w_RLRT·w_RLSD = A²."""
    w = []
    for name in ("rlrt", "rlsd"):
        recipe = make(name, coefficient=1.0, clip=1e9)
        student, teachers = streams(recipe)
        losses = result(recipe, student, teachers, replace(batch(), correct=~NOTHING))[0]
        w.append(losses / dense.at(dense.log_p(student.detach()), batch().target_ids))
    torch.testing.assert_close(w[0] * w[1], batch().advantage.square())


def test_anti_sd_is_gated_by_each_sequences_perplexity():
    """Greedy tokens of a peaked teacher: perplexities below 3, of which some are above the target."""
    recipe = make("anti_sd")
    student, teachers = streams(recipe)
    teacher = replace(teachers["teacher"], logit_scale=1.5)
    t = dense.log_p(teacher)
    y = t.argmax(-1)
    b = replace(batch(), target_ids=y, warmup_perplexity=1.6)
    s = dense.log_p(student)
    losses = dense.anti_sd(s, t, y, SEQUENCES, b.advantage, sigma=0.8, median=1.6)
    unmoved = dense.pg(b.advantage, s, y).detach()
    moved = {bool((losses.detach() - unmoved)[i == SEQUENCES].abs().max() > 1e-3) for i in SEQUENCES.unique()}
    assert moved == {True, False}
    close(result(recipe, student, {"teacher": teacher}, b), (losses.detach(), gradients(losses, student, {}, b)))


def test_edge_opd_without_evidence_is_its_anchor():
    recipe = make("edge_opd", live_teacher=True)
    student, teachers = streams(recipe)
    teachers = teachers | {"teacher": student.detach()}
    losses = 0.05 * dense.div(dense.log_p(student), dense.log_p(teachers["base"]), 1)
    close(result(recipe, student, teachers, batch()), (losses.detach(), gradients(losses, student, {}, batch())))


def test_pbsd_of_a_reference_like_the_student_is_ln_2():
    recipe = make("pbsd")
    student, _ = streams(recipe)
    now = dense.at(dense.log_p(student.detach()), batch().target_ids)
    losses, _ = result(recipe, student, {}, replace(batch(), reference_logprobs=now))
    assert abs(losses.sum().item() / 2 - torch.tensor(2.0).log().item()) < 1e-6


def test_layers_like_the_teachers_cost_nothing():
    layer = random(17, N, 6)
    losses, _ = make("oprd").token_loss(streams(make("oprd"))[0], {}, replace(batch(), layers=[(layer, layer, 1.0)]))
    assert not losses.any()


@pytest.mark.parametrize("name", names())
def test_what_is_needed_is_asked_for(name):
    """Only the fields that a recipe names are read, and each of them is missed."""
    recipe = make(name)
    student, teachers = streams(recipe)
    bare = {one.name: None for one in fields(TokenBatch)} | {
        "target_ids": batch().target_ids, "sequence_ids": SEQUENCES, "sampler_temperature": 1.0}  # fmt: skip
    full = bare | {need: getattr(batch(), need) for need in recipe.needs}
    losses, _ = recipe.token_loss(student, teachers, TokenBatch(**full))
    assert losses.isfinite().all()
    for need in recipe.needs:
        with pytest.raises(ValueError, match=need):
            recipe.token_loss(student, teachers, TokenBatch(**full | {need: None}))
    for context in recipe.contexts:
        with pytest.raises(ValueError, match=context):
            recipe.token_loss(student, {k: v for k, v in teachers.items() if k != context}, TokenBatch(**full))
