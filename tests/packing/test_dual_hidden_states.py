"""Packed passes against separate, unpadded, unbatched passes of the stock models, in float64."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import opsd_kernels.packing.attention as attention
import opsd_kernels.packing.dual as dual
import opsd_kernels.packing.prove as prove
import opsd_kernels.packing.vet as vet
import opsd_kernels.probe as probe
from opsd_kernels.packing import dual_hidden_states, pack_dual_context, plan_passes
from opsd_kernels.probe import modules_of
from opsd_kernels.triton_jit import INTERPRETED

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": None}),
}


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """float64 stays float64: the models' norms and eager softmax would go through float32."""
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, nn.functional.softmax
    matmul = torch.Tensor.__matmul__

    def exact_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 and args[:1] == (torch.float32,) else to(self, *args, **kwargs)

    def exact_softmax(x: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    def exact_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Some versions multiply positions with frequencies as matrices, of which only the latter were float64 before.
        return matmul(a, b) if a.dtype == b.dtype else matmul(to(a, torch.float64), to(b, torch.float64))

    monkeypatch.setattr(torch.Tensor, "to", exact_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))
    monkeypatch.setattr(nn.functional, "softmax", exact_softmax)
    monkeypatch.setattr(torch.Tensor, "__matmul__", exact_matmul)


def make_model(family: str, *, lora: bool = False, seed: int = 0, **extra: Any) -> Any:
    name, own = FAMILIES[family]
    torch.manual_seed(seed)
    settings = {**COMMON, **own, **extra}
    if family == "gemma2":  # whose softcap sdpa, the default of some versions, leaves out in silence
        settings["attn_implementation"] = "eager"
    if family == "gemma3":
        name = "Gemma3"
        settings["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        config = transformers.Gemma3TextConfig(**settings)
    else:
        config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -0.3, 0.3) if "gemma" in family else nn.init.uniform_(parameter, 0.7, 1.3)
        else:
            nn.init.normal_(parameter, std=0.2)
    if lora:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        ).double()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.2)
    return model.train()


def make_data(generations: int, seed: int = 0) -> tuple[list, list, list]:
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=draw).tolist()

    students = [tokens(9), tokens(4), tokens(1)]
    # The first two teachers' prompts begin like the students', the second one contains all of it, the third differs.
    teachers = [[*students[0][:6], *tokens(11)], [*students[1], *tokens(7)], tokens(5)]
    lengths = itertools.cycle([7, 1, 12, 0, 5, 8, 2])
    if generations == 1:
        return students, teachers, [tokens(7), tokens(1), tokens(12)]
    return students, teachers, [[tokens(next(lengths)) for _ in range(generations)] for _ in students]


def lm_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def flat(prompts: list, rollouts: list) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for prompt, own in zip(prompts, rollouts, strict=True):
        pairs += [(prompt, r) for r in (own if own and isinstance(own[0], list) else [own])]
    return pairs


def separate(model: Any, prompts: list, rollouts: list) -> torch.Tensor:
    """(R, H) by one stock, unpadded pass per rollout."""
    body, rows = lm_of(model).model, []
    for prompt, rollout in flat(prompts, rollouts):
        if rollout:
            out = body(input_ids=torch.tensor([[*prompt, *rollout[:-1]]]), use_cache=False).last_hidden_state[0]
            rows.append(out[len(prompt) - 1 :])
    return torch.cat(rows)


def loss_of(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, student.numel(), dtype=torch.float64).view_as(student)
    return (student * weights).sum() + (student * teacher.detach()).pow(2).sum()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(got: Any, want: Any) -> float:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        return max(worst(got[k], want[k]) for k in want)
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def reference(model: Any, teacher: Any, data: tuple[list, list, list]) -> tuple[Any, Any, dict]:
    students, teachers, rollouts = data
    other = model if isinstance(teacher, str) else teacher
    student = separate(model, students, rollouts)
    off = model.disable_adapter() if teacher == "base" else nullcontext()
    other.eval()
    with torch.no_grad(), off:
        target = separate(other, teachers, rollouts)
    model.train()
    return student.detach(), target, gradients(model, loss_of(student, target))


def compare(
    model: Any, teacher: Any, data: tuple, *, share: bool, checkpointing: bool = False, **options: Any
) -> float:
    """The largest relative difference from separate passes among hidden states and gradients."""
    want_student, want_teacher, want = reference(model, teacher, data)
    if checkpointing:
        lm_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = pack_dual_context(*data, share_prefix=share)
    got = dual_hidden_states(model, batch, teacher=teacher, **options)
    assert not got.teacher.requires_grad
    grads = gradients(model, loss_of(got.student, got.teacher))
    lm_of(model).gradient_checkpointing_disable()
    return max(worst(got.student.detach(), want_student), worst(got.teacher, want_teacher), worst(grads, want))


def make_pair(family: str, kind: str) -> tuple[Any, Any]:
    if kind == "module":
        return make_model(family), make_model(family, seed=1)
    if kind == "live":
        return make_model(family), "live"
    return make_model(family, lora=True), "base" if kind == "base" else "live"


KINDS = ["live", "live-lora", "base", "module"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("generations", [1, 4])
@pytest.mark.parametrize(
    ("kind", "passes"), [(k, p) for k in KINDS for p in ("two", "joint") if (k, p) != ("module", "joint")]
)
def test_equals_separate_passes(kind, passes, generations, share, checkpointing):
    model, teacher = make_pair("qwen3", kind)
    data = make_data(generations)
    assert compare(model, teacher, data, share=share, checkpointing=checkpointing, passes=passes) < 1e-12


@pytest.mark.parametrize("share", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("generations", [1, 4])
@pytest.mark.parametrize(("kind", "passes"), [("live", "two"), ("live", "joint"), ("base", "joint"), ("module", "two")])
def test_several_contexts_in_one_layout_equal_separate_passes(kind, passes, generations, share):
    model, teacher = make_pair("qwen3", kind)
    students, teachers, rollouts = make_data(generations)
    others = [[*students[0][:3], 50, 51], students[1], [60, 61]]  # one begins like the student's, one is the student's
    readings = [reference(model, teacher, (students, read, rollouts)) for read in (teachers, others)]
    batch = pack_dual_context(students, [*teachers, *others], rollouts, contexts=2, share_prefix=share)
    got = dual_hidden_states(model, batch, teacher=teacher, passes=passes)
    first, second = got.teacher.chunk(2)
    assert worst(got.student.detach(), readings[0][0]) < 1e-12
    assert worst(first, readings[0][1]) < 1e-12
    assert worst(second, readings[1][1]) < 1e-12
    assert worst(gradients(model, loss_of(got.student, second)), readings[1][2]) < 1e-12


@pytest.mark.parametrize("generations", [1, 4])
@pytest.mark.parametrize(("kind", "passes"), [("live", "two"), ("live", "joint"), ("base", "joint"), ("module", "two")])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3"])
def test_families_equal_separate_passes(family, kind, passes, generations):
    model, teacher = make_pair(family, kind)
    data = make_data(generations)
    assert compare(model, teacher, data, share=True, checkpointing=passes == "two", passes=passes) < 1e-12


@pytest.mark.parametrize("passes", ["two", "joint"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_eager_backend(family, passes, monkeypatch):
    monkeypatch.setattr(attention, "_TILE", 3)
    assert compare(make_model(family), "live", make_data(4), share=True, passes=passes, backend="eager") < 1e-12


def test_reentrant_checkpointing():
    model = make_model("qwen3")
    lm_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    data = make_data(1)
    want_student, want_teacher, want = reference(model, "live", data)
    got = dual_hidden_states(model, pack_dual_context(*data), passes="two")
    assert worst(got.student.detach(), want_student) < 1e-12
    assert worst(gradients(model, loss_of(got.student, got.teacher)), want) < 1e-12
    assert worst(got.teacher, want_teacher) < 1e-12


# Dropout.


class InjectedDropout(nn.Dropout):
    """A mask that depends on the token alone, wherever its row is. `keys` names the tokens of the coming rows."""

    keys: list[Any] = []  # noqa: RUF012
    calls = 0

    def __init__(self, number: int, width: int):
        super().__init__(0.3)
        self.number, self.width = number, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        assert x.shape[1] == len(self.keys)
        InjectedDropout.calls += 1
        masks = []
        for key in self.keys:
            draw = torch.Generator().manual_seed(hash((self.number, *key)) % 2**31)
            masks.append(torch.rand(self.width, generator=draw, dtype=torch.float64) > self.p)
        return x * torch.stack(masks) / (1 - self.p)


def inject(model: Any) -> None:
    number = 0
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            number += 1
            module.lora_dropout["default"] = InjectedDropout(number, module.in_features)


@pytest.mark.parametrize("generations", [1, 4])
@pytest.mark.parametrize("passes", ["two", "joint"])
@pytest.mark.parametrize("teacher", ["live", "base"])
def test_adapter_dropout_with_injected_masks(teacher, passes, generations):
    model = make_model("qwen3", lora=True)
    inject(model)
    students, teachers, rollouts = make_data(generations)
    several = [own if isinstance(own[0], list) else [own] for own in rollouts]
    rows, want = [], []
    for i, (prompt, own) in enumerate(zip(students, several, strict=True)):
        prompt_keys = [(i, -1, t) for t in range(len(prompt))]
        rows += prompt_keys
        for g, rollout in enumerate(own):
            if rollout:
                own_keys = [(i, g, t) for t in range(len(rollout) - 1)]
                rows += own_keys
                InjectedDropout.keys = [*prompt_keys, *own_keys]
                want.append(separate(model, [prompt], [rollout]))
    expected = torch.cat(want)
    model.eval()
    with torch.no_grad(), model.disable_adapter() if teacher == "base" else nullcontext():
        target = separate(model, teachers, rollouts)
    model.train()
    InjectedDropout.keys = rows
    InjectedDropout.calls = 0
    got = dual_hidden_states(model, pack_dual_context(students, teachers, rollouts), teacher=teacher, passes=passes)
    assert InjectedDropout.calls > 0
    assert worst(got.student.detach(), expected.detach()) < 1e-12
    assert worst(got.teacher, target) < 1e-12
    grads = gradients(model, loss_of(got.student, got.teacher))
    want_grads: dict[str, torch.Tensor] = {}
    model.zero_grad()
    # The reference's masks were of one rollout at a time, so its graphs are kept and differentiated here at once.
    loss_of(expected, target).backward()
    want_grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst(grads, want_grads) < 1e-12


@pytest.mark.parametrize("teacher", ["live", "base"])
def test_recompute_draws_the_same_dropout(teacher):
    model = make_model("qwen3", lora=True)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.3)
    batch, found = pack_dual_context(*make_data(4)), []
    for passes in ("two", "joint"):  # the student's rows draw in the same order in both, the teacher's never
        torch.manual_seed(5)
        got = dual_hidden_states(model, batch, teacher=teacher, passes=passes)
        torch.rand(7)  # what happens in between must not matter
        found.append((got.student.detach(), got.teacher, gradients(model, loss_of(got.student, got.teacher))))
    for one, other in zip(*found, strict=True):
        assert worst(one, other) < 1e-12


def test_dropout_outside_adapters_takes_two_passes():
    model = make_model("qwen3")
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    assert plan_passes(model).passes == "two"
    with pytest.raises(ValueError, match=r"dropout 0\.5 outside its adapters"):
        dual_hidden_states(model, pack_dual_context(*make_data(1)), passes="joint")


# The comparison itself.


def altered(batch: Any, joint: Any) -> Any:
    for share in (True, False):
        batch._joint[share] = joint
    return batch


def test_a_leak_from_teacher_to_student_is_seen():
    model, data = make_model("qwen3"), make_data(1)
    want = separate(model, *data[::2]).detach()
    batch = pack_dual_context(*data)
    joint = batch.joint(share_contexts=True)
    first, *others = joint.layout.segments
    n = joint.student.rows
    leaky = attention.Layout(
        joint.layout.ids,
        joint.layout.positions,
        (type(first)(first.start, first.stop, ((n, n + 1),)), *others),
    )
    got = dual_hidden_states(
        model, altered(batch, type(joint)(leaky, joint.student, joint.student_rows, joint.teacher_rows)), passes="joint"
    )
    assert worst(got.student.detach(), want) > 1e-6


def test_a_wrong_position_is_seen():
    model, data = make_model("qwen3"), make_data(4)
    want = separate(model, *data[::2]).detach()
    batch = pack_dual_context(*data)
    rollout = next(s for s in batch.student.layout.segments if s.prefix)
    batch.student.layout.positions[rollout.start : rollout.stop] += 1
    assert worst(dual_hidden_states(model, batch, passes="two").student.detach(), want) > 1e-6


def test_a_wrong_row_is_seen():
    model, data = make_model("qwen3"), make_data(4)
    want = separate(model, *data[::2]).detach()
    batch = pack_dual_context(*data)
    batch.student.rows[3] += 1
    assert worst(dual_hidden_states(model, batch, passes="two").student.detach(), want) > 1e-6


# Memory.


def saved_bytes(model: Any, batch: Any, **options: Any) -> int:
    """Bytes of the storages that the graph holds, views counting as what they are views of, parameters not at all."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address is used twice
        return t

    plan_passes(model, **options)  # the trial on a few tokens is over with the first call
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = dual_hidden_states(model, batch, **options)
    assert got.student.requires_grad
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["live", "live-lora", "base"])
@pytest.mark.parametrize("passes", ["two", "joint"])
def test_teacher_rows_save_nothing(passes, kind, checkpointing):
    model, teacher = make_pair("qwen3", kind)
    if checkpointing:
        lm_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    students, teachers, rollouts = make_data(4)
    sizes = [
        saved_bytes(model, pack_dual_context(students, longer, rollouts), teacher=teacher, passes=passes)
        for longer in (teachers, [[*t, *range(3, 90)] for t in teachers], [[5, *t, *range(3, 60)] for t in teachers])
    ]
    assert sizes[0] == sizes[1] == sizes[2]
    without = pack_dual_context(students, students, rollouts)
    assert saved_bytes(model, without, teacher=teacher, passes=passes) == sizes[0]
    if checkpointing:
        layer_inputs = 3 * without.student.layout.rows * 32 * 8
        assert layer_inputs <= sizes[0] < 2.5 * layer_inputs


# Around it.


@pytest.mark.parametrize("passes", ["two", "joint"])
@pytest.mark.parametrize("kind", ["live", "base"])
def test_autocast(kind, passes):
    """bfloat16 within twice the error of the stock path; weights cast for the teacher still get their gradients."""
    model, teacher = make_pair("qwen3", kind)
    data = make_data(4)
    exact = reference(model, teacher, data)
    model.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = reference_autocast(model, teacher, data)
        got = dual_hidden_states(model, pack_dual_context(*data), teacher=teacher, passes=passes)
    ours = (got.student.detach(), got.teacher, gradients(model, loss_of(got.student, got.teacher)))
    for mine, theirs, want in zip(ours, stock, exact, strict=True):
        assert difference(mine, want) < 2 * difference(theirs, want)


def reference_autocast(model: Any, teacher: str, data: tuple) -> tuple[Any, Any, dict]:
    students, teachers, rollouts = data
    student = separate(model, students, rollouts)
    model.eval()
    with torch.no_grad(), model.disable_adapter() if teacher == "base" else nullcontext():
        target = separate(model, teachers, rollouts)
    model.train()
    return student.detach(), target, gradients(model, loss_of(student, target))


def difference(got: Any, want: Any) -> float:
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        pairs = [(got[k], want[k]) for k in want]
    else:
        pairs = [(got, want)]
    return sum(float((a.double() - b).norm() / b.norm()) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_frozen_embedding_and_partial_training(passes):
    model = make_model("qwen3")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    assert compare(model, "live", make_data(1), share=True, passes=passes) < 1e-12


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_without_gradients_and_in_eval_mode(passes):
    model, data = make_model("qwen3").eval(), make_data(4)
    want = separate(model, *data[::2]).detach()
    with torch.no_grad():
        got = dual_hidden_states(model, pack_dual_context(*data), passes=passes)
    assert not got.student.requires_grad
    assert worst(got.student, want) < 1e-12
    got = dual_hidden_states(model, pack_dual_context(*data), passes=passes)
    assert got.student.requires_grad
    assert not any(m.training for m in model.modules())
    # Some versions of transformers checkpoint without gradients, too.
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.no_grad():
        got = dual_hidden_states(model, pack_dual_context(*data), passes=passes)
    assert worst(got.student, want) < 1e-12


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_leaves_the_model_as_it_was(passes):
    model = make_model("qwen3", lora=True)
    lm_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def state() -> list[Any]:
        return [
            (
                m.training,
                m.__dict__.get("gradient_checkpointing"),
                m.__dict__.get("_gradient_checkpointing_func"),
                "forward" in m.__dict__,
                len(m._forward_pre_hooks),
            )
            for m in model.modules()
        ]

    before, implementation = state(), lm_of(model).config._attn_implementation
    got = dual_hidden_states(model, pack_dual_context(*make_data(1)), teacher="base", passes=passes)
    loss_of(*got).backward()
    assert state() == before
    assert lm_of(model).config._attn_implementation == implementation
    with pytest.raises(ValueError, match="token id"):
        dual_hidden_states(model, pack_dual_context([[VOCAB]], [[3]], [[4, 5]]), passes=passes)
    assert state() == before


def test_gradients_accumulate_and_graphs_can_be_used_twice():
    model, batch = make_model("qwen3"), pack_dual_context(*make_data(4))
    got = dual_hidden_states(model, batch, passes="joint")
    loss = loss_of(*got)
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * once[n], rtol=1e-12) for n, p in model.named_parameters() if n in once)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("generations", [1, 4])
def test_the_last_mlp_sees_only_the_rows_that_predict_something(generations, checkpointing):
    model = make_model("qwen3")
    if checkpointing:
        model.gradient_checkpointing_enable()
    students, teachers, rollouts = make_data(generations)
    batch = pack_dual_context(students, teachers, rollouts)
    plan_passes(model)  # its trial counts for nothing here
    seen: list[list[int]] = [[], [], []]
    for layer, calls in zip(model.model.layers, seen, strict=True):
        layer.mlp.gate_proj.register_forward_hook(lambda _, args, out, calls=calls: calls.append(args[0].shape[1]))
    student, teacher = dual_hidden_states(model, batch, passes="two")
    loss_of(student, teacher).backward()
    used = [len(set(side.rows.tolist())) for side in (batch.teacher, batch.student)]
    rows = [side.layout.rows for side in (batch.teacher, batch.student)]
    again = 1 if checkpointing else 0  # the student's layers, recomputed
    assert seen == [[*rows, *rows[1:] * again]] * 2 + [[*used, *used[1:] * again]]
    assert "forward" not in model.model.layers[-1].mlp.__dict__


def test_a_compiled_model_keeps_its_last_mlp():
    model = make_model("qwen3")
    batch = pack_dual_context(*make_data(1))
    plan_passes(model)
    seen: list[int] = []
    model.model.layers[-1].mlp.gate_proj.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    model.model._compiled_call_impl = model.model._call_impl  # as if compiled, for nothing
    dual_hidden_states(model, batch, passes="two")
    assert seen == [batch.teacher.layout.rows, batch.student.layout.rows]


def test_nothing_to_predict():
    model = make_model("qwen3")
    got = dual_hidden_states(model, pack_dual_context([[3, 4]], [[5]], [[]]))
    assert got.student.shape == got.teacher.shape == (0, 32)
    assert got.student.requires_grad
    assert not got.teacher.requires_grad
    got.student.sum().backward()
    with torch.no_grad():
        assert not dual_hidden_states(model, pack_dual_context([[3, 4]], [[5]], [[]])).student.requires_grad


def test_attention_refuses_to_run_without_its_layout():
    model = make_model("qwen3")
    attention.register()
    model.config._attn_implementation = attention.NAME
    with pytest.raises(RuntimeError, match="needs its layout"):
        model(input_ids=torch.tensor([[3, 4]]))
    model.config._attn_implementation = "sdpa"


def test_mixture_of_experts():
    FAMILIES["moe"] = (
        "Qwen3Moe",
        {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    )
    for passes in ("two", "joint"):
        assert compare(make_model("moe"), "live", make_data(4), share=True, passes=passes) < 1e-12


def lora(model: Any, **options: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "head"),
    ],
)
def test_adapters_refused_for_the_base_teacher(options, reason):
    with pytest.raises(ValueError, match=reason):
        dual_hidden_states(lora(make_model("qwen3"), **options), pack_dual_context(*make_data(1)), teacher="base")


def forbid_work(monkeypatch):
    """From here on any pass of a model is a failure of the test."""

    def work(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(vet.Body, "run", work)
    monkeypatch.setattr(prove, "_plain", work)


PROMPT_LEARNING = {
    "PREFIX_TUNING": "PrefixTuningConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
    "P_TUNING": "PromptEncoderConfig",
}


@pytest.mark.parametrize("passes", ["two", "auto"])
@pytest.mark.parametrize("argument", ["model", "teacher"])
@pytest.mark.parametrize("kind", [*PROMPT_LEARNING, "activated"])
def test_adapters_that_act_outside_the_layers_are_refused(kind, argument, passes, monkeypatch):
    if kind == "activated":
        adapted, said = lora(make_model("qwen3"), alora_invocation_tokens=[5, 6]), "is an activated LoRA"
    else:
        config = getattr(peft, PROMPT_LEARNING[kind])(task_type="CAUSAL_LM", num_virtual_tokens=3)
        adapted, said = peft.get_peft_model(make_model("qwen3"), config), f"is {kind}, whose virtual tokens"
    model, teacher = (adapted, "live") if argument == "model" else (make_model("qwen3"), adapted)
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match=f"{argument} Qwen3ForCausalLM cannot run .*adapter 'default' {said}"):
        dual_hidden_states(model, pack_dual_context(*make_data(1)), teacher=teacher, passes=passes)


@pytest.mark.parametrize("passes", ["two", "joint", "auto"])
@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_the_base_teacher_wants_adapters_beside_the_weights(state, passes, monkeypatch):
    model, batch = make_model("qwen3", lora=True), pack_dual_context(*make_data(1))
    model.merge_adapter() if state == "merged" else model.base_model.disable_adapter_layers()
    live = dual_hidden_states(model, batch, passes=passes)  # there the state is the caller's wish
    assert worst(live.teacher, separate(model.eval(), *make_data(1)[1:]).detach()) < 1e-12
    model.train()
    forbid_work(monkeypatch)
    advice = r"unmerge_adapter\(\)" if state == "merged" else r"enable_adapter_layers\(\)"
    with pytest.raises(ValueError, match=f"teacher='base': .*{state}.*{advice}"):
        dual_hidden_states(model, batch, teacher="base", passes=passes)
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
    assert layers
    assert all(m.merged == (state == "merged") and m.disable_adapters == (state == "disabled") for m in layers)


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_base_teacher_of_several_adapters_one_of_them_frozen(passes):
    model = make_model("qwen3", lora=True)
    second = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.double().base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(False)
    data, trained = make_data(4), [p.requires_grad for p in model.parameters()]
    batch = pack_dual_context(*data)
    got = dual_hidden_states(model, batch, teacher="base", passes=passes)
    assert [p.requires_grad for p in model.parameters()] == trained
    grads = gradients(model, loss_of(*got))
    assert not any(".second." in name for name in grads)
    want_student, want_teacher = separate(model, *data[::2]), None
    with torch.no_grad():
        want_teacher = separate(make_model("qwen3"), *data[1:])  # the weights that the adapters were added to
    assert worst(got.student.detach(), want_student.detach()) < 1e-12
    assert worst(got.teacher, want_teacher) < 1e-12
    assert worst(grads, gradients(model, loss_of(want_student, want_teacher))) < 1e-12


def test_base_teacher_needs_a_base():
    batch = pack_dual_context(*make_data(1))
    with pytest.raises(ValueError, match=r"teacher='base' needs a model with LoRA adapters.*frozen copy"):
        dual_hidden_states(make_model("qwen3"), batch, teacher="base")
    model = lora(make_model("qwen3"))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"norm\.weight is trained too"):
        dual_hidden_states(model, batch, teacher="base")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"output_router_logits": True}, "router loss"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
            "three-dimensional",
        ),
        ({"hidden_size_per_layer_input": 8}, "per-layer inputs"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
            "dynamic",
        ),
    ],
)
def test_models_refused_by_name(settings, reason):
    model = make_model("qwen3")
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"model Qwen3ForCausalLM cannot run on packed rows.*{reason}"):
        dual_hidden_states(model, pack_dual_context(*make_data(1)))


def test_recurrent_models_refused():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot run on packed rows: its layers are recurrent"):
        dual_hidden_states(transformers.MambaForCausalLM(config), pack_dual_context(*make_data(1)))


def test_a_layout_that_reaches_no_attention_is_refused(monkeypatch):
    FAMILIES["nemotron"] = ("Nemotron", {})
    model, batch = make_model("nemotron"), pack_dual_context(*make_data(1))
    assert "sdpa" in plan_passes(make_model("qwen3"), teacher=make_model("llama")).reason
    for call in (
        lambda: plan_passes(model),
        lambda: plan_passes(make_model("qwen3"), teacher=model),
        lambda: dual_hidden_states(model, batch),
    ):
        with pytest.raises(ValueError, match=r"NemotronForCausalLM cannot run .*its attention gets no keyword"):
            call()
    # Where it could not be tried it shows at the first layer.
    for trial in ("try_rows", "try_joint"):
        monkeypatch.setattr(dual, trial, lambda *_, **__: prove.Trial(untried="for the test"))
    for passes in ("two", "joint"):
        with pytest.raises(ValueError, match=r"model NemotronForCausalLM cannot run .*its attention gets no keyword"):
            dual_hidden_states(model, batch, passes=passes)


# What a trial on a few tokens sees.

Qwen3Layer = transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer
Qwen3Attention = transformers.models.qwen3.modeling_qwen3.Qwen3Attention


class ShiftedLayer(Qwen3Layer):
    """A layer that mixes each row with the one before it, whichever context that belongs to."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states + 0.1 * hidden_states.roll(1, dims=1), **kwargs)


class Rewritten(Qwen3Layer):
    """The same layer in other words, keywords handed on under other names."""

    forward = eval(
        "lambda layer, hidden_states, *a, **others: (lambda y: y + layer.mlp(layer.post_attention_layernorm(y)))("
        "hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **dict(others))[0])"
    )


class Windowless(Qwen3Attention):
    """It knows of its window from its mask alone."""

    def forward(self, *args, **kwargs):
        self.sliding_window = None
        return super().forward(*args, **kwargs)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class OddGradient(Qwen3Layer):
    """Its gradient is wrong for more rows than any context of the trial has."""

    def forward(self, hidden_states, **kwargs):
        out = super().forward(hidden_states, **kwargs)
        return Doubled.apply(out) if out.shape[1] > 12 else out


def of_layers(kind: type, **extra: Any) -> Any:
    model = make_model("qwen3", **extra)
    for layer in model.model.layers:
        part = layer.self_attn if issubclass(kind, Qwen3Attention) else layer
        part.__class__ = kind
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_see_each_other_are_refused_with_the_numbers(dtype):
    model, batch = of_layers(ShiftedLayer).to(dtype), pack_dual_context(*make_data(1))
    said = r"Qwen3ForCausalLM cannot run .*student's packed rows are not those of a plain pass: row \d+ .*is off by \d"
    for call in (
        lambda: plan_passes(model),
        lambda: dual_hidden_states(model, batch),
        lambda: dual_hidden_states(make_model("qwen3").to(dtype), batch, teacher=model),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert plan_passes(make_model("qwen3").to(dtype)).passes == "two"
    plan = plan_passes(make_model("qwen3").to(dtype), passes="joint")
    assert "not tried" not in plan.reason


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_the_same_maths_in_other_words_works(passes):
    data, batch = make_data(4), pack_dual_context(*make_data(4))
    want = separate(make_model("qwen3"), *data[::2]).detach()
    got = dual_hidden_states(of_layers(Rewritten), batch, passes=passes)
    assert worst(got.student.detach(), want) < 1e-12


def test_a_window_that_the_attention_is_not_given_is_refused():
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": None}
    assert plan_passes(make_model("qwen3", **sliding)).passes == "two"
    with pytest.raises(ValueError, match="sliding window of 64 in 3 layers, and its attention was given one in 0"):
        plan_passes(of_layers(Windowless, **sliding))


def test_a_gradient_that_is_another_takes_two_passes():
    model = of_layers(OddGradient)
    with pytest.raises(
        ValueError, match=r"passes='joint' is not possible: .*the gradient of OddGradient\.\S+ is off by"
    ):
        plan_passes(model, passes="joint")
    model.gradient_checkpointing_enable()
    plan = plan_passes(model)
    assert plan.passes == "two"
    assert "is off by" in plan.reason


def test_a_model_is_tried_once_for_the_same_settings():
    model, calls = make_model("qwen3", lora=True), []
    lm_of(model).model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    plan_passes(model, teacher="base", passes="joint")
    first = len(calls)
    assert 0 < first < 20
    model.eval()
    plan_passes(model, teacher="base", passes="joint")
    plan_passes(model)
    assert len(calls) == first
    lm_of(model).model.layers[0].__class__ = ShiftedLayer
    with pytest.raises(ValueError, match="not those of a plain pass"):
        plan_passes(model)


def test_a_trial_leaves_the_model_and_the_random_numbers_as_they_were():
    model = make_model("qwen3", lora=True)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.3)
    model.get_base_model().model.layers[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan_passes(model, teacher="base", passes="joint")
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert lm_of(model).config._attn_implementation != attention.NAME


def test_sharded_weights_are_not_tried_and_it_is_said(monkeypatch):
    model = make_model("qwen3")
    monkeypatch.setattr(prove, "no_trial", lambda _: "its weights are sharded over processes")
    with pytest.warns(UserWarning, match="packed rows serve .* of Qwen3ForCausalLM .* could not be tried .* sharded"):
        plan = plan_passes(model)
    assert "not tried on tokens: its weights are sharded over processes" in plan.reason


class ScaledLayer(transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer):
    """A layer that is given something else of each row."""

    def forward(self, hidden_states, row_scale=None, **kwargs):
        return super().forward(hidden_states if row_scale is None else hidden_states * row_scale, **kwargs)


def test_models_whose_layers_are_not_alone_take_two_passes(monkeypatch):
    FAMILIES["nanochat"] = ("NanoChat", {"attention_dropout": 0.0})
    scaled, noisy = make_model("qwen3"), make_model("qwen3")
    scaled.model.layers[1].__class__ = ScaledLayer
    noisy.config.residual_dropout = 0.1
    reasons = {
        "NanoChatModel uses its final norm 2 times": make_model("nanochat"),
        "ScaledLayer takes row_scale beside the hidden states": scaled,
        r"residual_dropout is 0\.1 in training, which a teacher must not see": noisy,
    }
    for reason, model in reasons.items():
        assert compare(model, "live", make_data(4), share=True, checkpointing=True) < 1e-12
        lm_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert plan_passes(model).passes == "two"
        with pytest.raises(ValueError, match=f"passes='joint' is not possible: {reason}.*accepted here: 'two'"):
            dual_hidden_states(model, pack_dual_context(*make_data(4)), passes="joint")
    assert plan_passes(noisy.eval(), passes="joint").passes == "joint"
    # Where it could not be tried it shows before backward.
    monkeypatch.setattr(dual, "try_joint", lambda *_, **__: prove.Trial(untried="for the test"))
    with pytest.raises(ValueError, match="needs the final norm once, after the last layer, and NanoChatModel"):
        dual_hidden_states(make_model("nanochat"), pack_dual_context(*make_data(1)), passes="joint")


def test_a_second_way_for_gradients_into_a_layer_is_refused():
    model = make_model("qwen3")
    learnt = nn.Parameter(torch.ones(1, 1, 8, dtype=torch.float64))
    model.model.rotary_emb.register_forward_hook(lambda *a: tuple(t * learnt for t in a[-1]))
    batch = pack_dual_context(*make_data(1))
    loss_of(*dual_hidden_states(model, batch, passes="two")).backward()
    assert learnt.grad is not None
    with pytest.raises(ValueError, match="needs layers that get a gradient through their hidden states alone"):
        dual_hidden_states(model, batch, passes="joint")


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_layers_that_run_several_times(passes):
    model = make_model("qwen3")
    model.model.layers[1] = model.model.layers[2]  # so that the last one's MLP feeds a later attention
    assert compare(model, "live", make_data(4), share=True, passes=passes) < 1e-12


@pytest.mark.parametrize(
    ("backend", "needs"),
    [
        ("flash", "needs the package flash-attn, which is not installed"),
        ("varlen", "needs a CUDA device, float16 or bfloat16 .*, got cpu, torch.float64, head size 8"),
        ("triton", "cannot run: the Triton kernel takes .*, not torch.float64"),
    ],
)
@pytest.mark.parametrize("passes", ["two", "joint"])
def test_backends_that_cannot_run_are_refused_first(backend, needs, passes, monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: None)
    model, batch = make_model("qwen3"), pack_dual_context(*make_data(1))
    forbid_work(monkeypatch)
    message = f"backend '{backend}' {needs}.*model Qwen3ForCausalLM.*accepted here: 'auto', 'sdpa', 'eager'$"
    with pytest.raises(ValueError, match=message):
        dual_hidden_states(model, batch, passes=passes, backend=backend)


def test_backends_must_serve_the_teacher_too(monkeypatch):
    batch = pack_dual_context(*make_data(1))
    forbid_work(monkeypatch)
    message = r"backend 'sdpa' needs the CPU and no softcap, .* 2\.0 \(teacher Gemma2ForCausalLM\).*: 'auto', 'eager'$"
    with pytest.raises(ValueError, match=message):
        dual_hidden_states(make_model("qwen3"), batch, teacher=make_model("gemma2"), backend="sdpa")


def test_what_backends_need():
    cuda, half = torch.device("cuda"), torch.bfloat16
    needs = attention.backend_obstacle
    assert needs("varlen", cuda, half, 256) is None
    assert "float16 or bfloat16" in needs("varlen", cuda, torch.float32)
    assert "heads of up to 256" in needs("varlen", cuda, half, 257)
    assert "no softcap, got 30.0" in needs("varlen", cuda, half, 64, 30.0)
    assert "needs the CPU" in needs("sdpa", cuda, half)
    assert needs("eager", cuda, torch.float64, 512, 30.0) is needs("auto", cuda, torch.float64, 512, 30.0) is None


def test_devices_are_checked_first():
    batch = pack_dual_context(*make_data(1))
    with pytest.raises(ValueError, match="teacher is on device meta, model on cpu; accepted: one device for both"):
        dual_hidden_states(make_model("qwen3"), batch, teacher=make_model("llama").to("meta"))
    with pytest.raises(ValueError, match="model Qwen3ForCausalLM is on device meta; accepted: one that holds data"):
        dual_hidden_states(make_model("qwen3").to("meta"), batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher": "ema"}, ValueError, "teacher must be 'live', 'base' or a torch.nn.Module, got 'ema'"),
        ({"teacher": 3}, TypeError, "teacher must be .*, got int"),
        ({"passes": "one"}, ValueError, "passes must be 'auto', 'two' or 'joint', got 'one'"),
        ({"backend": "magic"}, ValueError, "backend must be one of 'auto', .*, got 'magic'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        dual_hidden_states(make_model("qwen3"), pack_dual_context(*make_data(1)), **options)


def test_bad_objects():
    with pytest.raises(TypeError, match="batch must be a DualContextBatch from pack_dual_context, got tuple"):
        dual_hidden_states(make_model("qwen3"), make_data(1))
    with pytest.raises(TypeError, match="model must be a causal language model of transformers, got Linear"):
        dual_hidden_states(nn.Linear(2, 2), pack_dual_context(*make_data(1)))
    with pytest.raises(ValueError, match=r"passes='joint' is not possible: the teacher is a model of its own"):
        dual_hidden_states(
            make_model("qwen3"), pack_dual_context(*make_data(1)), teacher=make_model("qwen3"), passes="joint"
        )


def test_plan_says_what_and_why():
    model = make_model("qwen3", lora=True)
    plan = plan_passes(model, teacher="base")
    assert (plan.passes, plan.backend) == ("two", "sdpa")
    assert "twice" in plan.reason
    lm_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert plan_passes(model, teacher="base").passes == "joint"
    assert not plan_passes(model, teacher="base").share_contexts
    assert plan_passes(model, teacher="live").share_contexts
    assert plan_passes(model, teacher=make_model("qwen3")).passes == "two"


@pytest.mark.parametrize(
    ("capability", "flash", "wrong", "half", "capped", "full"),
    [
        ((9, 0), False, (), "varlen", "triton", "triton"),
        ((9, 0), True, (), "varlen", "flash", "triton"),
        ((9, 0), False, ("varlen",), "triton", "triton", "triton"),
        ((9, 0), True, ("varlen",), "flash", "flash", "triton"),
        ((9, 0), True, ("varlen", "flash"), "triton", "triton", "triton"),
        ((9, 0), False, ("varlen", "triton"), "eager", "eager", "eager"),
        ((7, 5), False, (), "varlen", "eager", "eager"),
        ((7, 5), False, ("varlen",), "eager", "eager", "eager"),
    ],
)
def test_choice_on_cuda(capability, flash, wrong, half, capped, full, monkeypatch):
    """In bfloat16, with a softcap, in float32, where the self-check finds some backends wrong."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 runs the kernels on the CPU only")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda _: flash or None)
    monkeypatch.setattr(attention, "self_check", lambda name, *_, **__: "is off" if name in wrong else None)

    def choice(*arguments):
        return dual.choose_backend(torch.device("cuda"), *arguments)

    backend, reason = choice(torch.bfloat16)
    assert backend == half
    assert ("varlen is off" in reason) == ("varlen" in wrong)
    backend, reason = choice(torch.bfloat16, 256, 50.0)
    assert backend == capped
    assert "varlen has no softcap, got 50.0" in reason
    backend, reason = choice(torch.float32, 128)
    assert backend == full
    assert re.search("varlen needs .* got cuda, torch.float32, head size 128", reason)
    assert ("triton cannot run: compute capability 7.5 is below 8.0" in reason) == (capability < (8, 0))
    assert choice(torch.float32, 256)[0] == choice(torch.float64)[0] == choice(torch.bfloat16, 512)[0] == "eager"


# The CUDA backends, with the kernel they call replaced by what it documents.


def documented_varlen(corner: str):
    """FlashAttention over ragged sequences with causal masks aligned at a `corner`: "last" or "first"."""

    def call(q, k, v, ragged, scale, window, softcap):
        out, groups = [], q.shape[1] // k.shape[1]
        assert (ragged.cu_q.dtype, ragged.cu_k.dtype) == (torch.int32, torch.int32)
        assert ragged.max_q == int(ragged.cu_q.diff().max())
        assert ragged.max_k == int(ragged.cu_k.diff().max())
        for i in range(len(ragged.cu_q) - 1):
            qi = q[ragged.cu_q[i] : ragged.cu_q[i + 1]].transpose(0, 1)
            ki, vi = (
                t[ragged.cu_k[i] : ragged.cu_k[i + 1]].transpose(0, 1).repeat_interleave(groups, 0) for t in (k, v)
            )
            n, m = qi.shape[1], ki.shape[1]
            shift = m - n if corner == "last" else 0
            distance = torch.arange(n)[:, None] + shift - torch.arange(m)
            hidden = (distance < 0) | (distance > (m if window is None else window - 1))
            scores = (qi @ ki.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
            out.append((scores.softmax(-1) @ vi).transpose(0, 1))
        return torch.cat(out)

    return call


@pytest.mark.parametrize("passes", ["two", "joint"])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_ragged_backends_get_the_right_ranges(family, passes, monkeypatch):
    monkeypatch.setattr(dual, "backend_obstacle", lambda *_: None)
    attention._check_alignment.cache_clear()
    monkeypatch.setattr(attention, "_varlen_call", documented_varlen("last"))
    for generations in (1, 4):
        data = make_data(generations)
        assert compare(make_model(family), "live", data, share=True, passes=passes, backend="varlen") < 1e-12


@pytest.fixture
def _fresh_checks():
    check = attention.self_check  # which a test may replace
    check.cache_clear()
    yield
    check.cache_clear()


def off(call: Any, fault: str) -> Any:
    """A kernel with a fault: in what it returns, in a gradient alone, for a window alone, or an exception."""

    def faulty(q, k, v, ragged, scale, window, softcap):
        if fault == "raises":
            raise TypeError("unexpected keyword argument 'enable_gqa'")
        if fault == "ignores the window":
            window = None
        if fault == "first key unseen by the second rollout":
            at = int(ragged.cu_k[2])
            v = torch.cat([v[:at], torch.zeros_like(v[:1]), v[at + 1 :]])
        if fault == "no gradient of keys":
            k = k.detach() + 0 * k
        out = call(q, k, v, ragged, 1.02 * scale if fault == "scale" else scale, window, softcap)
        return out * math.nan if fault == "NaN" else out

    return faulty


FAULTS = (
    "raises",
    "NaN",
    "scale",
    "ignores the window",
    "no gradient of keys",
    "first key unseen by the second rollout",
)


@pytest.mark.usefixtures("_fresh_checks")
@pytest.mark.parametrize("fault", [None, "alignment", *FAULTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_fails_its_self_check_is_not_used(fault, dtype, monkeypatch, caplog):
    """On the CPU, by a kernel in varlen's place: each fault is found, logged once and passed over."""
    right, calls = documented_varlen("first" if fault == "alignment" else "last"), []
    monkeypatch.setattr(attention, "_varlen_call", off(right, fault))
    monkeypatch.setattr(attention, "_check_alignment", lambda *_: calls.append(1))
    monkeypatch.setattr(attention, "backend_obstacle", lambda name, *_: None if name == "varlen" else "is not there")
    check = attention.self_check
    monkeypatch.setattr(attention, "self_check", lambda name, _, *a, **k: check(name, torch.device("cpu"), *a, **k))
    with torch.no_grad(), caplog.at_level("WARNING"):
        for _ in range(3):
            backend, reason = attention.choose_backend(torch.device("cuda"), dtype, 128)
    assert len(calls) == (1 if fault == "raises" else 2)  # once in all, without and with a window
    assert backend == ("varlen" if fault is None else "eager")
    assert len(caplog.records) == (fault is not None)
    if fault is not None:
        assert re.search(r"fails on cpu \(TypeError.*'enable_gqa'" if fault == "raises" else "is off by", reason)
        assert reason.startswith("varlen ")
        assert "packing backend varlen" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backends may be right there")
@pytest.mark.usefixtures("_fresh_checks")
def test_a_device_that_fails_altogether_leaves_the_plain_backend(monkeypatch):
    monkeypatch.setattr(attention, "backend_obstacle", lambda *_: None)
    assert attention.choose_backend(torch.device("cuda"), torch.bfloat16, 128)[0] == "eager"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("asks", [None, False, True], ids=["installed", "torch 2.11", "torch 2.13"])
def test_varlen_is_told_of_grouped_queries_where_it_asks(asks, grouped, monkeypatch):
    """The call fits the installed torch, and torch with and without `enable_gqa`."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def without(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        pass

    def with_it(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        pass

    signature = inspect.signature({None: varlen.varlen_attn, False: without, True: with_it}[asks])
    given = {}

    def called(*args, **kwargs):
        given.update(signature.bind(*args, **kwargs).arguments)
        return given["query"]

    called.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", called)
    q, k = torch.zeros(4, 4, 8), torch.zeros(6, 2 if grouped else 4, 8)
    ragged = attention._Ragged(torch.tensor([0, 4]), torch.tensor([0, 6]), 4, 6, None)
    attention._varlen_call(q, k, k, ragged, 0.5, 3, None)
    assert given.get("enable_gqa", False) == (grouped and "enable_gqa" in signature.parameters)
    assert (given["scale"], given["window_size"]) == (0.5, (2, 0))


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_ragged_backends_refuse_another_alignment(backend, monkeypatch):
    monkeypatch.setattr(dual, "backend_obstacle", lambda *_: None)
    attention._check_alignment.cache_clear()
    monkeypatch.setattr(attention, f"_{backend}_call", documented_varlen("first"))
    with pytest.raises(RuntimeError, match=f"'{backend}' does not align causal masks at the last key"):
        dual_hidden_states(make_model("qwen3"), pack_dual_context(*make_data(4)), backend=backend)
    attention._check_alignment.cache_clear()


def test_softcap_without_a_kernel_for_it():
    with pytest.raises(ValueError, match="backend 'sdpa' needs the CPU and no softcap"):
        dual_hidden_states(make_model("gemma2"), pack_dual_context(*make_data(1)), backend="sdpa")
    assert plan_passes(make_model("gemma2")).backend == "eager"


@pytest.mark.parametrize("passes", ["two", "joint"])
def test_a_model_is_searched_once_a_call_and_not_in_every_layer(passes, monkeypatch):
    """With adapters a model has thousands of modules: in every layer, the search would be most of the host's time."""

    def searches(layers: int) -> int:
        model = make_model("qwen3", lora=True, num_hidden_layers=layers).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = pack_dual_context([[5, 6, 7]], [[5, 6, 8, 9]], [[[10, 11, 12]]])
        dual_hidden_states(model, batch, teacher="base", passes=passes)  # tries the model
        inner, count, plain = model.get_base_model().model, [], nn.Module.named_modules

        def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            count.extend([1] if self is inner else [])
            return plain(self, *args, **kwargs)

        def listed(module: nn.Module) -> list[nn.Module]:
            count.extend([1] if module in (inner, model.get_base_model()) else [])
            return modules_of(module)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counted)
            for room in (probe, vet):
                patch.setattr(room, "modules_of", listed)
            dual_hidden_states(model, batch, teacher="base", passes=passes).student.sum().backward()
        return len(count)

    assert 0 < searches(2) == searches(5)
