"""The token view's numbers against dense float64 computation, and its text against the tokenizer."""

import dataclasses
import math

import pytest
import torch
from _models import VOCAB, examples, lora, model, run_of
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import opsd.token_view
from opsd.rollouts import Rollout
from opsd.scoring import score
from opsd.step import micro_batches
from opsd.token_view import LIKELIEST, NEGLIGIBLE, _Words, token_view
from opsd_kernels.probe import evaluating


def ids(count, seed=3):
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def different_run(kind="llama", double=True, **options):
    """A run whose student has moved away from its teacher, the base."""
    student = model(kind)
    if double:
        student = student.double()
    run = run_of(student, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if kind == "gpt2" else 0.03))  # a flat one moves less
    return run


def dense(logits, temperature, scale=1.0, cap=None, vocab=None):
    """Probabilities over the vocabulary, by the formula."""
    z = logits[:, :vocab].double() * scale
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    return torch.softmax(z / temperature, -1)


def logits_of(lm, prompt, rollout):
    with torch.no_grad(), evaluating(lm):
        return lm(torch.tensor([[*prompt, *rollout]])).logits[0, len(prompt) - 1 : -1]


def terms_of(p_s, p_t, beta):
    if beta == 0:
        return p_t * (p_t / p_s).log()
    if beta == 1:
        return p_s * (p_s / p_t).log()
    m = (1 - beta) * p_s + beta * p_t
    return beta * p_t * (p_t / m).log() + (1 - beta) * p_s * (p_s / m).log()


def check(view, p_s, p_t, beta, rollout, run):
    terms = terms_of(p_s, p_t, beta)
    assert len(view) == len(rollout)
    assert any(entry["divergence"] > 0.01 for entry in view)
    for i, entry in enumerate(view):
        assert entry["id"] == rollout[i]
        assert entry["p_student"] == pytest.approx(p_s[i, rollout[i]].item(), rel=6e-4)
        assert entry["p_teacher"] == pytest.approx(p_t[i, rollout[i]].item(), rel=6e-4)
        assert entry["divergence"] == pytest.approx(terms[i].sum().item(), rel=6e-4, abs=1e-9)
        most = int(terms[i].argmax())
        expected = [terms[i, most].item(), p_s[i, most].item(), p_t[i, most].item()]
        assert entry["dominant"][0] == run.tokenizer.decode([most])
        assert entry["dominant"][1:] == pytest.approx(expected, rel=6e-4)
        likely = {*p_s[i].topk(LIKELIEST).indices.tolist(), *p_t[i].topk(LIKELIEST).indices.tolist()}
        likely = {v for v in likely if max(p_s[i, v], p_t[i, v]) >= NEGLIGIBLE}
        expected = {run.tokenizer.decode([v]): [p_s[i, v].item(), p_t[i, v].item()] for v in likely}
        shown = {text: numbers for text, *numbers in entry["alternatives"]}
        assert shown == {text: pytest.approx(numbers, rel=6e-4) for text, numbers in expected.items()}
        best = [max(numbers) for numbers in shown.values()]
        assert best == sorted(best, reverse=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 0.7), (0.2, 1.5), (1.0, 1.0)])
def test_the_numbers_are_those_of_dense_float64(kind, beta, temperature):
    run = different_run(kind, objective__beta=beta, objective__temperature=temperature, objective__entry_clip=0.01)
    example, rollout = examples()[1], ids(11)
    p_s = dense(logits_of(run.model, example.student, rollout), temperature)
    p_t = dense(logits_of(run.teacher.model, example.teacher, rollout), temperature)
    view = token_view(run, example, Rollout(rollout, False))
    check(view, p_s, p_t, beta, rollout, run)
    assert "".join(entry["text"] for entry in view) == run.tokenizer.decode(rollout)


def test_softcap_scale_bias_and_padding_columns_take_part():
    run = different_run("llama", objective__beta=0.5, objective__temperature=0.9)
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    run = dataclasses.replace(
        run, head=dataclasses.replace(run.head, logit_scale=1.3, softcap=4.0, valid_vocab=VOCAB - 5, bias=bias)
    )
    run.teacher.head = dataclasses.replace(run.teacher.head, logit_scale=0.6)
    example, rollout = examples()[0], [i % (VOCAB - 10) + 3 for i in ids(7)]
    vocab = VOCAB - 5
    p_s = dense(logits_of(run.model, example.student, rollout) + bias, 0.9, 1.3, 4.0, vocab)
    p_t = dense(logits_of(run.teacher.model, example.teacher, rollout), 0.9, 0.6, None, vocab)
    check(token_view(run, example, Rollout(rollout, False)), p_s, p_t, 0.5, rollout, run)


def test_the_sampled_token_form_shows_the_divergence_it_estimates():
    run = different_run(objective__form="sampled_token", objective__beta=0.5)
    example, rollout = examples()[0], ids(6)
    p_s = dense(logits_of(run.model, example.student, rollout), 1.0)
    p_t = dense(logits_of(run.teacher.model, example.teacher, rollout), 1.0)
    check(token_view(run, example, Rollout(rollout, False)), p_s, p_t, 1.0, rollout, run)


def test_the_mean_divergence_is_the_metrics_one():
    run = different_run(double=False, objective__token_clip=0.05, objective__top_k=4)
    example, rollout = examples()[3], ids(9)
    rollout = Rollout(rollout, False)
    (batch,) = micro_batches(run, [example], [rollout])
    _, stats = run.recipe.loss(*score(run, batch), batch, len(rollout.ids))
    view = token_view(run, example, rollout)
    mean = sum(entry["divergence"] for entry in view) / len(view)
    assert mean == pytest.approx(stats["divergence"].mean().item(), rel=1e-3)


def test_few_rows_of_logits_exist_at_a_time(monkeypatch):
    run, example, rollout = different_run(), examples()[1], Rollout(ids(150), True)
    seen = []

    def recorded(self, out, *rest):
        seen.append(out.shape[0])
        return plain(self, out, *rest)

    plain = opsd.token_view.Products.project
    monkeypatch.setattr(opsd.token_view.Products, "project", recorded)
    whole = token_view(run, example, rollout)
    assert max(seen) <= 64
    seen.clear()
    monkeypatch.setattr(opsd.token_view, "MAX_ELEMENTS", 3 * VOCAB)
    assert token_view(run, example, rollout) == whole
    assert max(seen) == 3


def test_the_model_is_left_as_it_was():
    adapted = lora(model("llama"))
    adapted.train()
    next(iter(adapted.children())).eval()  # mixed modes
    run = run_of(adapted)
    modes = [module.training for module in adapted.modules()]
    before = torch.random.get_rng_state()
    example, rollout = examples()[0], Rollout(ids(5), True)
    views = [token_view(run, example, rollout) for _ in range(2)]
    assert views[0] == views[1]
    assert views[0][0]["divergence"] > 0
    assert [module.training for module in adapted.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_autocast_and_an_empty_rollout():
    run = different_run(double=False, model__autocast="bfloat16")
    exact = different_run(double=False)
    example, rollout = examples()[0], Rollout(ids(5), True)
    for entry, close in zip(token_view(run, example, rollout), token_view(exact, example, rollout), strict=True):
        assert entry["p_student"] == pytest.approx(close["p_student"], rel=0.3, abs=0.02)
    assert token_view(run, example, Rollout([], True)) == []


def test_an_infinite_divergence_is_none():
    run = different_run(objective__beta=1.0)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[7] = -math.inf
    run.teacher.head = dataclasses.replace(run.teacher.head, bias=bias)
    entry = token_view(run, examples()[0], Rollout([7, 8], False))[0]
    assert entry["divergence"] is None
    assert entry["p_teacher"] == 0
    assert entry["dominant"][:2] == [run.tokenizer.decode([7]), None]


def byte_level():
    """One token for each byte, and one for the whole of "ab"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)} | {"ab": len(alphabet)}
    raw = Tokenizer(tokenizer_models.BPE(vocab, [("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_belongs_to_the_last():
    tokenizer = byte_level()
    text = "ab é漢🙂\n🙂 .b"
    tokens = tokenizer(text)["input_ids"]
    pieces = _Words(tokenizer, tokens).pieces()
    assert "".join(pieces) == text
    assert len(pieces) == len(tokens)
    assert pieces[:7] == ["ab", " ", "", "é", "", "", "漢"]
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_rollout_cut_within_a_character_and_bytes_that_are_none():
    tokenizer = byte_level()
    tokens = tokenizer("a🙂")["input_ids"][:3]
    pieces = _Words(tokenizer, tokens).pieces()
    assert "".join(pieces) == tokenizer.decode(tokens) == "a\ufffd"
    lost = [*tokens, *tokenizer("x漢y")["input_ids"]]
    assert "".join(_Words(tokenizer, lost).pieces()) == tokenizer.decode(lost)


def test_a_leading_space_is_part_of_a_token():
    raw = Tokenizer(tokenizer_models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "▁": 3}, unk_token="s"))
    raw.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)
    words = _Words(tokenizer, [0, 1, 2, 1])
    assert "".join(words.pieces()) == tokenizer.decode([0, 1, 2, 1]) == "the cats cat"
    assert words.pieces()[1] == words.alone(1) == " cat"
    assert words.alone(2) == "s"
