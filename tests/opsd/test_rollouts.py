import pytest
import torch
from _models import VOCAB, lora, model
from transformers import GenerationConfig

from opsd.rollouts import Sampling, first_end, generate

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def sample(student, prompts=PROMPTS, *, seed=0, end_ids=(1,), batch_size=8, pad_id=0, **sampling):
    options = Sampling(**{"max_new_tokens": 16, **sampling})
    return generate(student, prompts, options, end_ids=end_ids, pad_id=pad_id, batch_size=batch_size, seed=seed)


def test_first_end_token_is_kept_and_nothing_after_it():
    assert first_end([5, 7, 1, 6, 7], [1, 7]).ids == [5, 7]
    assert first_end([5, 1, 1, 1], [1]).ids == [5, 1]
    assert not first_end([5, 1, 1], [1]).truncated
    assert first_end([5, 0, 6, 0], [1]).ids == [5, 0, 6, 0]  # a pad id within is a token like others
    assert first_end([5, 6], [1]).truncated


def test_generated_rollouts_obey_the_end_rule_when_the_pad_is_an_end():
    student = model()
    ends = [1, *range(20, 26)]  # common enough that some rollouts end early and are padded
    rollouts = sample(student, PROMPTS * 6, end_ids=ends, pad_id=20)
    assert {r.truncated for r in rollouts} == {True, False}
    for r in rollouts:
        assert not any(token in ends for token in r.ids[:-1])
        assert (r.ids[-1] in ends) != r.truncated
        assert not r.truncated or len(r.ids) == 16


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_batching_and_padding_do_not_change_greedy_rollouts(kind):
    student = model(kind)
    together = sample(student, temperature=0)
    apart = sample(student, temperature=0, batch_size=1)
    assert [r.ids for r in together] == [r.ids for r in apart]
    for prompt, r in zip(PROMPTS, apart, strict=True):  # and they are the model's own argmax
        logits = student.eval()(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == r.ids


def test_sampling_depends_on_its_seed_alone_and_leaves_the_state_alone():
    student = model()
    torch.manual_seed(1)
    first = sample(student)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert sample(student) == first != sample(student, seed=1)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_keeps_its_modes_and_its_generation_config_stays_out():
    student = model("llama", attention_dropout=0.5).train()
    student.model.layers[0].eval()
    plain = sample(student, temperature=0)
    own = GenerationConfig(repetition_penalty=50.0, suppress_tokens=list(range(3, VOCAB - 4)), max_length=2, top_k=1)
    student.generation_config = own
    assert sample(student, temperature=0) == plain
    assert student.generation_config is own
    assert student.training
    assert not student.model.layers[0].training
    assert student.model.layers[1].training


def test_default_sampling_reaches_beyond_the_libraries_default_top_k():
    student = model()
    torch.nn.init.zeros_(student.get_output_embeddings().weight)  # uniform over the vocabulary
    rollouts = sample(student, [[5]] * 64, end_ids=[])
    assert len({token for r in rollouts for token in r.ids}) > 60


def test_cache_is_used_with_gradient_checkpointing(monkeypatch):
    student = lora(model())
    student.gradient_checkpointing_enable()
    student.config.use_cache = False
    widths = []
    body = student.get_base_model().model
    body.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    sample(student.train())
    assert widths[1:]
    assert set(widths[1:]) == {1}
