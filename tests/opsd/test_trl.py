"""Losses and gradients of TRL's own trainers, beside theirs with our loss, on batches that TRL made."""

import copy
import logging

import pytest
import torch
from _models import lora, model, tokenizer

trl = pytest.importorskip("trl", minversion="1.16", exc_type=ImportError)
datasets = pytest.importorskip("datasets")

from accelerate.state import AcceleratorState  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl.experimental.sdft import SDFTConfig  # noqa: E402
from trl.experimental.sdft import SDFTTrainer as TheirSDFT  # noqa: E402
from trl.experimental.sdpo import SDPOConfig  # noqa: E402
from trl.experimental.sdpo import SDPOTrainer as TheirSDPO  # noqa: E402

from opsd.integrations import trl as ours  # noqa: E402

SDFT = (TheirSDFT, ours.SDFTTrainer, SDFTConfig)
SDPO = (TheirSDPO, ours.SDPOTrainer, SDPOConfig)
DISTILLATION = (trl.DistillationTrainer, ours.DistillationTrainer, trl.DistillationConfig)


@pytest.fixture(autouse=True)
def alone():
    """Without TRL's advice, and with a state of accelerate's own, which is global."""
    logging.disable(logging.WARNING)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    found = {}
    for kind in ("qwen3", "nemotron"):
        found[kind] = tmp_path_factory.mktemp(kind)
        model(kind).save_pretrained(found[kind])
        tokenizer().save_pretrained(found[kind])
    return found


def made(which, tmp_path, directory, adapted=False, mixed=False, **options):
    """A trainer of each of the two classes, alike in all else."""
    rows = [{"prompt": f"{i} plus {7 * i}?", "privileged_context": f"it is {8 * i}, by counting"} for i in range(8)]
    theirs, own, config = which
    options |= {} if which is DISTILLATION else {"num_generations": 2}
    trainers = []
    for one in (theirs, own):
        words = tokenizer()
        words.padding_side = "left"
        torch.manual_seed(1)
        student = AutoModelForCausalLM.from_pretrained(directory)
        student = lora(student) if adapted else student
        args = config(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_completion_length=9, report_to=[],
            use_cpu=True, bf16=mixed, max_steps=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
            disable_tqdm=True, **options,
        )  # fmt: skip
        more = {"teacher_model": model("qwen3", seed=5)} if which is DISTILLATION else {}
        if which is SDPO:
            more["reward_funcs"] = lambda completions, **_: [float(len(c) % 2) for c in completions]
        trainers.append(one(model=student, args=args, train_dataset=datasets.Dataset.from_list(rows),
                            processing_class=words, **more))  # fmt: skip
    return trainers, rows


def batch_of(trainer, rows):
    """A micro-batch of TRL's making: ragged prompts and completions, one of which ends early."""
    torch.manual_seed(3)
    trainer.model.train()
    return trainer._prepare_inputs([copy.deepcopy(rows[i // 2]) for i in range(4)])


def loss_and_gradients(trainer, inputs):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, {**inputs}, num_items_in_batch=None)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def nudged(trainers):
    """The student is no longer its teacher."""
    for trainer in trainers:
        draw = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def check_equal(trainers, inputs):
    (theirs, their_gradients), (loss, gradients) = (loss_and_gradients(t, inputs) for t in trainers)
    assert theirs.abs() > 1e-3
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == their_gradients.keys()
    scale = max(g.abs().max() for g in their_gradients.values())
    assert scale > 1e-3
    for name, gradient in gradients.items():
        assert (gradient - their_gradients[name]).abs().max() <= 1e-5 * scale, name


MODES = {
    "forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.5, "temperature": 0.7},
    "top k": {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 0.3},
    "tail": {"distillation_mode": "topk_logits", "distillation_topk": 5, "distillation_alpha": 1.0,
             "distillation_add_tail": True},
    "token": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
@pytest.mark.thinned(3)
def test_sdft_is_that_of_trl(tmp_path, directories, mode, adapted, teacher):
    extra = {"num_loss_tokens_to_skip": 2} if mode in ("jsd", "top k") else {}
    trainers, rows = made(SDFT, tmp_path, directories["qwen3"], adapted, teacher_model_kind=teacher,
                          **MODES[mode], **extra)  # fmt: skip
    if adapted and teacher == "ema":
        for trainer in trainers:
            trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    nudged(trainers)
    check_equal(trainers, batch_of(trainers[0], rows))


def test_the_importance_clip_and_the_mean_over_tokens_are_those_of_trl(tmp_path, directories):
    trainers, rows = made(SDFT, tmp_path, directories["qwen3"], distillation_is_clip=1.2, **MODES["jsd"])
    nudged(trainers)
    inputs = batch_of(trainers[0], rows)
    gap = torch.randn(inputs["completion_ids"].shape, generator=torch.Generator().manual_seed(2))
    without, _ = loss_and_gradients(trainers[1], inputs)
    inputs["old_per_token_logps"] = -3 + gap
    check_equal(trainers, inputs)
    assert (loss_and_gradients(trainers[1], inputs)[0] - without).abs() > 1e-3
    theirs, own = (t._metrics["train"]["self_distillation/distillation_loss"] for t in trainers)
    assert own[-1] == pytest.approx(theirs[-1], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_sdpo_is_that_of_trl(tmp_path, directories, mode):
    trainers, rows = made(SDPO, tmp_path, directories["qwen3"], include_environment_feedback=True,
                          teacher_model_kind="base", **MODES[mode])  # fmt: skip
    nudged(trainers)
    inputs = batch_of(trainers[0], rows)
    assert inputs["self_distillation_mask"].sum() == 4
    inputs["self_distillation_mask"][1] = 0  # one rollout that has nothing to learn from
    inputs["completion_mask"][2] = 0  # and one that was cut off
    check_equal(trainers, inputs)
    inputs["self_distillation_mask"][:] = 0
    for trainer in trainers:
        loss, gradients = loss_and_gradients(trainer, inputs)
        assert loss == 0
        assert all(not gradient.any() for gradient in gradients.values())


def test_sdpo_refuses_what_needs_the_logits_of_the_policy(tmp_path, directories):
    with pytest.raises(ValueError, match=r"distillation_weight is 0\.5; accepted: 1, .* or 0"):
        made(SDPO, tmp_path, directories["qwen3"], distillation_weight=0.5)
    trainers, rows = made(SDPO, tmp_path, directories["qwen3"], distillation_weight=0.0)
    check_weights = batch_of(trainers[0], rows)
    check_weights["advantages"] = torch.tensor([1.0, -1.0, 0.5, 0.5])
    check_equal(trainers, check_weights)  # TRL's own


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation_is_that_of_trl(tmp_path, directories, beta, adapted):
    trainers, rows = made(DISTILLATION, tmp_path, directories["qwen3"], adapted, beta=beta, temperature=0.8)
    inputs = batch_of(trainers[0], rows)
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1] = 0  # what a tool wrote
    check_equal(trainers, inputs)
    theirs, own = (t._metrics["train"]["entropy"] for t in trainers)
    assert own[-1] == pytest.approx(theirs[-1], rel=1e-5)
    assert theirs[-1] > 0.1


def test_a_model_that_does_not_pack_runs_padded(tmp_path, directories):
    trainers, rows = made(SDFT, tmp_path, directories["nemotron"], **MODES["jsd"])
    nudged(trainers)
    with pytest.warns(UserWarning, match="scored padded, since .*Nemotron"):
        check_equal(trainers, batch_of(trainers[0], rows))


@pytest.mark.parametrize("which", [SDFT, DISTILLATION])
def test_a_training_ends_with_the_weights_of_trl(tmp_path, directories, which):
    options = MODES["jsd"] | {"distillation_is_clip": None} if which is SDFT else {"beta": 0.5}
    trainers, _ = made(which, tmp_path, directories["qwen3"], gradient_accumulation_steps=2, **options)
    before = {name: p.detach().clone() for name, p in trainers[0].model.named_parameters()}
    for trainer in trainers:
        torch.manual_seed(4)
        trainer.train()
    theirs, own = (dict(t.model.named_parameters()) for t in trainers)
    moved = max((theirs[name] - before[name]).abs().max() for name in before)
    assert moved > 1e-2  # two steps of Adam
    for name in before:
        gap = (theirs[name] - own[name]).abs()
        assert gap.median() <= 1e-6, name
        assert gap.mean() <= 1e-4, name  # Adam divides by next to nothing in places
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_mixed_precision_is_that_of_accelerate(tmp_path, directories):
    trainers, rows = made(SDFT, tmp_path, directories["qwen3"], mixed=True, **MODES["jsd"])
    nudged(trainers)
    inputs = batch_of(trainers[0], rows)
    for trainer in trainers:  # as accelerate wraps the model at the start of a training
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
    (theirs, _), (loss, _) = (loss_and_gradients(t, inputs) for t in trainers)
    exact = loss_and_gradients(made(SDFT, tmp_path, directories["qwen3"], **MODES["jsd"])[0][1], inputs)[0]
    assert abs(loss - theirs) < 0.02 * theirs
    assert loss != exact
