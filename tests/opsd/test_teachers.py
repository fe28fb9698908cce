import contextlib
import copy
import json

import pytest
import torch
from _models import VOCAB, examples, lora, model, run_of, tokenizer, write_model, write_rows

import opsd
from opsd.config import load_config
from opsd.errors import ConfigError
from opsd.prompts import Prompter
from opsd.reasoning import analyse
from opsd.step import opsd_step
from opsd.teachers import make_teacher
from opsd_kernels import lm_head_of

PROMPTS, ROLLOUTS = [[5, 6, 7], [9, 8]], [[4, 5, 6], [7, 1]]


def nudge(student, seed=0):
    """Changes what is trained of `student`."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)


def trained(student):
    return {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapted", [False, True])
def test_the_average_is_that_of_the_weights_at_every_interval(adapted):
    student = model("qwen3").double().eval()
    student = lora(student) if adapted else student
    teacher = run_of(student, teacher__kind="ema", teacher__ema_decay=0.8, teacher__ema_every=2).teacher
    expected = trained(student)
    for step in range(1, 6):
        nudge(student, step)
        teacher.update(step)
        if step in (2, 4):
            expected = {n: 0.8 * e + 0.2 * trained(student)[n] for n, e in expected.items()}
    reference = copy.deepcopy(student)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in expected:
                parameter.copy_(expected[name])
    from opsd.scoring import rollout_hidden

    torch.testing.assert_close(teacher.hidden(PROMPTS, ROLLOUTS), rollout_hidden(reference, PROMPTS, ROLLOUTS))
    assert (teacher.hidden(PROMPTS, ROLLOUTS) - rollout_hidden(student, PROMPTS, ROLLOUTS)).abs().max() > 1e-3
    # only what is trained has a second copy
    storages = {p.data_ptr() for p in student.parameters()}
    own = [n for n, p in teacher.source.named_parameters() if p.data_ptr() not in storages]
    assert sorted(own) == sorted(expected)
    assert (lm_head_of(student).weight is teacher.head.weight) == adapted


def test_an_average_of_16_bit_weights_does_not_round_its_updates_away():
    student = model().bfloat16()
    teacher = make_teacher(load(teacher__kind="ema", teacher__ema_decay=0.999), student, tokenizer())
    before = {n: p.detach().clone() for n, p in teacher.source.named_parameters()}
    nudge(student)
    for step in range(1, 301):
        teacher.update(step)
    share = 1 - 0.999**300
    target = {name: parameter.detach() for name, parameter in student.named_parameters()}
    for name, parameter in teacher.source.named_parameters():
        moved, way = ((now.detach().float() - before[name].float()).flatten() for now in (parameter, target[name]))
        assert torch.dot(moved, way) / way.square().sum() == pytest.approx(share, abs=0.03), name


def load(**options):
    pairs = [("model.path", "given"), ("data.train", "given"), *((n.replace("__", "."), v) for n, v in options.items())]
    return load_config(None, pairs)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("packing", [True, False])
def test_every_teacher_gives_a_loss_of_its_own_and_no_gradient_to_itself(tmp_path, adapted, packing):
    write_model(tmp_path / "other", "qwen3")
    losses = set()
    for kind in ("base", "live", "ema", "model"):
        student = model("qwen3", seed=3)
        student = lora(student) if adapted else student
        path = {"teacher__path": str(tmp_path / "other")} if kind == "model" else {}
        run = run_of(student, teacher__kind=kind, model__packing="on" if packing else "off", **path)
        nudge(student, 1)  # before the first update the teachers are otherwise the same weights
        nudge(student, 2)
        run.teacher.update(1)
        result = opsd_step(run, examples(), 1)
        assert result.loss > 1e-3
        assert sum(p.grad.abs().sum() for p in student.parameters() if p.grad is not None) > 1e-3
        if not isinstance(run.teacher.source, str):
            assert all(p.grad is None and not p.requires_grad for p in run.teacher.source.parameters())
        losses.add(round(float(result.loss), 6))
    assert len(losses) == 4


def test_another_model_has_to_have_the_vocabulary(tmp_path):
    student = model()
    words = tokenizer()
    write_model(tmp_path / "same", "qwen3")
    config = load(teacher__kind="model", teacher__path=str(tmp_path / "same"))
    assert make_teacher(config, student, words).head.weight.shape[0] == VOCAB

    words.add_tokens(["<more>"])
    with pytest.raises(ConfigError, match=r"teacher\.path.*another vocabulary.*<more>"):
        make_teacher(config, student, words)

    model("qwen3", vocab_size=VOCAB + 7).save_pretrained(tmp_path / "same")  # padded further
    assert make_teacher(config, student, tokenizer()).head.weight.shape[0] == VOCAB
    model("qwen3", vocab_size=VOCAB - 1).save_pretrained(tmp_path / "same")
    with pytest.raises(ConfigError, match=r"teacher\.path.*lm_head has"):
        make_teacher(config, student, tokenizer())
    with pytest.raises(ConfigError, match=r"teacher\.path.*there is no directory"):
        make_teacher(load(teacher__kind="model", teacher__path=str(tmp_path / "absent")), student, tokenizer())


@pytest.mark.parametrize(("kind", "path"), [("model", None), ("base", "somewhere")])
def test_a_path_goes_with_the_kind_model_alone(kind, path):
    with pytest.raises(ConfigError, match=r"teacher\.path"):
        load(teacher__kind=kind, teacher__path=path)


def test_the_teacher_writes_an_analysis_that_joins_its_prompt_alone(tmp_path):
    student = model("qwen3")
    run = run_of(student, teacher__kind="base", teacher__reason_first="true", teacher__reason_max_new_tokens=9)
    rows = write_rows(tmp_path / "train.jsonl", 3)
    from opsd.prompts import read_examples

    prompter = Prompter(run.tokenizer, run.config.prompts)
    plain = read_examples(run.config.data, prompter, str(rows), required=("problem", "solution"), reason=True).examples
    nudge(student)  # the teacher's weights write, not the student's
    first = analyse(run, prompter, plain, 1)
    again = analyse(run, prompter, plain, 1)
    other = analyse(run, prompter, plain, 2)
    assert [e.teacher for e in first.examples] == [e.teacher for e in again.examples]
    assert [e.teacher for e in first.examples] != [e.teacher for e in other.examples]
    for before, after in zip(plain, first.examples, strict=True):
        assert after.student == before.student
        text = run.tokenizer.decode(after.teacher)
        assert "Your own notes" in text
        assert len(after.teacher) > len(before.teacher)
    assert 1 <= first.mean_length <= 9
    with run.teacher.active() as teacher:
        from opsd.rollouts import Sampling, derive_seed

        seeds = [derive_seed(0, "reason", 1, 0)]
        written = run.engine.write(teacher, [prompter.reason(plain[0].row)], Sampling(9), seeds, 1)
    assert run.tokenizer.decode(written[0].ids, skip_special_tokens=True).strip() in run.tokenizer.decode(
        first.examples[0].teacher
    )


@pytest.fixture
def options(tmp_path):
    return {
        "model": {"path": str(write_model(tmp_path / "base"))},
        "data": {
            "train": str(write_rows(tmp_path / "train.jsonl")),
            "eval": str(write_rows(tmp_path / "eval.jsonl", 3)),
        },
        "optim": {"steps": 4, "batch_size": 3, "lr": 1e-2, "warmup_steps": 0},
        "rollout": {"max_new_tokens": 6},
        "run": {"device": "cpu", "dir": str(tmp_path / "out"), "save": False},
    }


def records(result, name="metrics"):
    return [json.loads(line) for line in (result.run_dir / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_whose_teacher_reasons_first(options):
    options["teacher"] = {"reason_first": True, "reason_max_new_tokens": 7}
    result = opsd.train(options, quiet=True)
    plain = opsd.load_config(options)
    assert plain.teacher.reason_first
    for record in records(result):
        assert 1 <= record["analysis_length"] <= 7
        assert record["seconds_reason"] > 0
        assert record["divergence"] > 1e-4
    assert set(result.evaluations) == {"base", "teacher", "trained"}


def test_callables_take_the_place_of_the_parts(options):
    calls = []

    def rollouts(run, batch, number):
        calls.append("rollouts")
        return [opsd.Rollout([5, 6, 1], truncated=False) for _ in batch]

    def loss(run, student_hidden, teacher_hidden, rollouts, denominator):
        calls.append("loss")
        gap = (student_hidden - teacher_hidden).square().sum(-1)
        return gap.sum() / denominator, {"gap": gap.detach()}

    def teacher(config, student, tokenizer):
        calls.append("teacher")
        return make_teacher(config, student, tokenizer)

    def evaluate(run, student, examples, context):
        calls.append(f"evaluate {context}")
        return opsd.Evaluation(0.25, 0.1, 0.4, len(examples), 1, 3.0, 0.0)

    result = opsd.train(options, rollouts=rollouts, teacher=teacher, loss=loss, evaluate=evaluate, quiet=True)
    assert calls[:3] == ["teacher", "evaluate student", "evaluate teacher"]
    assert {"rollouts", "loss"} < set(calls)
    record = records(result)[-1]
    assert record["gap"] == pytest.approx(record["loss"])
    assert record["rollout_length"] == 3
    assert result.evaluations["trained"].accuracy == 0.25


def test_patience_and_the_best_weights(options):
    scores = iter([0.1, 0.9, 0.2, 0.5, 0.3, 0.2, 0.1])
    options["optim"]["steps"] = 8
    options["eval"] = {"every": 1, "patience": 2, "keep_best": True}
    options["run"]["save"] = True
    options["run"]["checkpoint_every"] = 1
    options["run"]["keep_checkpoints"] = 9

    def evaluate(run, student, examples, context):
        score = next(scores)
        return opsd.Evaluation(score, 0.0, 1.0, len(examples), 1, 3.0, 0.0)

    result = opsd.train(options, evaluate=evaluate, quiet=True)
    # base .1, teacher .9, then steps 1 to 4: .2 .5 .3 .2
    assert result.summary["steps"] == 4
    assert result.summary["stopped_early"]
    assert result.summary["best"] == {"step": 2, "accuracy": 0.5}
    assert result.evaluations["trained"].accuracy == 0.2
    from safetensors.torch import load_file

    from opsd.checkpoint import load_checkpoint

    run_id = json.loads((result.run_dir / "run.json").read_text())["id"]
    best = load_file(result.run_dir / "best" / "model.safetensors")
    last = load_file(result.run_dir / "model" / "model.safetensors")
    for weights, step in ((best, 2), (last, 4)):
        state = load_checkpoint(result.run_dir / "checkpoints" / f"step-{step:08d}", run_id=run_id)["model"]
        assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert any(not torch.equal(value, last[name]) for name, value in best.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "paper",
            {
                "lora.r": 64, "lora.alpha": 128, "optim.lr": 5e-6, "optim.max_grad_norm": 0.1, "optim.batch_size": 32,
                "optim.steps": 100, "rollout.max_new_tokens": 1024, "rollout.temperature": 1.1, "rollout.top_p": 0.95,
                "rollout.top_k": 20, "objective.beta": 0.0, "objective.entry_clip": 0.05, "teacher.kind": "base",
            },
        ),
        ("sdft", {"teacher.kind": "ema", "objective.top_k": 100, "rollout.importance_cap": 2.0}),
        ("sdpo", {"teacher.kind": "ema", "rollout.per_prompt": 8, "objective.tail_bucket": True}),
    ],
)  # fmt: skip
def test_presets_lie_below_what_is_given(name, expected, tmp_path):
    pairs = [("model.path", "m"), ("data.train", "t")]
    for config in (load_config(None, pairs, name), load_config({"preset": name}, pairs)):
        for option, value in expected.items():
            section, _, field = option.partition(".")
            assert getattr(getattr(config, section), field) == value, option
    assert load_config(None, [*pairs, ("optim.steps", "7")], name).optim.steps == 7
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_config(None, [], name)


def test_unknown_presets_and_those_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"'papr'.*tiny, paper, sdft, sdpo"):
        load_config(None, [], "papr")
    with pytest.raises(ConfigError, match=r"preset tiny"):
        load_config(None, [("model.path", "m"), ("data.train", "t")], "tiny")
    assert load_config(None, [], "tiny") == load_config()


class Own:
    """A teacher of one's own, with something wrong in it."""

    def __init__(self, wrapped, **wrong):
        self.wrapped, self.wrong = wrapped, wrong

    def __getattr__(self, name):
        if name in ("wrapped", "wrong"):
            raise AttributeError(name)
        if name in self.wrong and self.wrong[name] is AttributeError:
            raise AttributeError(name)
        return self.wrong[name] if name in self.wrong else getattr(self.wrapped, name)


@pytest.mark.parametrize(("wrong", "error", "said"), [
    ({"update": AttributeError, "hidden": 5}, TypeError, r"type Own, which lacks hidden, update; accepted: an opsd"),
    ({"head": torch.nn.Linear(3, 4)}, TypeError, r"its head of type Linear; accepted: an opsd_kernels.Head"),
    ({"source": "ema"}, ValueError, r"its source 'ema'; accepted: 'live', 'base' or the model"),
    ({"active": lambda: model()}, TypeError, r"active\(\) is no context manager"),
    ({"active": lambda: contextlib.nullcontext(None)}, TypeError, r"active\(\) yields NoneType; accepted: a torch.nn"),
    ({"hidden": lambda *_: None}, TypeError, r"hidden\(\) returned NoneType; accepted: \(R, H\) rows"),
    ({"hidden": lambda p, r: torch.ones(2, 32)}, ValueError, r"hidden\(\) returned shape \(2, 32\); accepted: .* 32\)"),
    (
        {"hidden": lambda p, r: torch.ones(sum(map(len, r)), 32, requires_grad=True)},
        ValueError,
        r"states with a gradient; accepted: .* without a gradient",
    ),
])  # fmt: skip
def test_a_teachers_mistakes_are_named(tmp_path, wrong, error, said):
    options = {
        "model": {"path": write_model(tmp_path / "base"), "packing": "off"},
        "data": {"train": write_rows(tmp_path / "train.jsonl")},
        "rollout": {"max_new_tokens": 4},
        "optim": {"steps": 1, "batch_size": 2},
        "run": {"device": "cpu", "dir": str(tmp_path / "out")},
    }
    with pytest.raises(error, match=said):
        opsd.train(options, teacher=lambda *given: Own(make_teacher(*given), **wrong), quiet=True)
    with pytest.raises(TypeError, match=r"the teacher \(teacher\) is of type NoneType, which lacks head, source"):
        opsd.train(options, teacher=lambda *_: None, quiet=True)
