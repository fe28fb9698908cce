import sys
from types import SimpleNamespace

import pytest
import torch
from _models import VOCAB, examples, lora, model, run_of
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from opsd.engines.decoding import ROOM, GrowingLayer
from opsd.engines.generate import GenerateEngine, inverse_cdf
from opsd.engines.vllm import VllmEngine, shapes, trained_weights, with_vllm
from opsd.errors import ConfigError
from opsd.options import ModelConfig
from opsd.rollouts import Sampling, first_end

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def sample(student, prompts=PROMPTS, *, seeds=None, end_ids=(1,), batch_size=8, pad_id=0, **sampling):
    options = Sampling(**{"max_new_tokens": 16, **sampling})
    seeds = range(len(prompts)) if seeds is None else seeds
    return GenerateEngine(end_ids, pad_id, ModelConfig()).write(student, prompts, options, seeds, batch_size)


def exact(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to sample from, by its definition, for one vector of logits."""
    p = (logits.double() / temperature).softmax(-1)
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_k:
        kept &= p >= p.topk(top_k).values[-1]
    p = p * kept / (p * kept).sum()
    if top_p < 1:  # the smallest set that reaches top_p
        order = p.argsort(descending=True)
        kept[order[1:]] &= p[order].cumsum(-1)[:-1] < top_p
        p = p * kept / (p * kept).sum()
    kept &= p >= min_p * p.max()
    return p * kept / (p * kept).sum()


def test_first_end_token_is_kept_and_nothing_after_it():
    assert first_end([5, 7, 1, 6, 7], [1, 7]).ids == [5, 7]
    assert first_end([5, 1, 1, 1], [1]).ids == [5, 1]
    assert not first_end([5, 1, 1], [1]).truncated
    assert first_end([5, 0, 6, 0], [1]).ids == [5, 0, 6, 0]  # a pad id within is a token like others
    assert first_end([5, 6], [1]).truncated
    assert first_end([5, 1, 6], [1], [-0.5, -0.25, -3.0]).logprobs == [-0.5, -0.25]
    assert first_end([5, 6], [1], [-0.5, -0.25]).logprobs == [-0.5, -0.25]


def test_generated_rollouts_obey_the_end_rule_when_the_pad_is_an_end():
    student = model()
    ends = [1, *range(20, 26)]  # common enough that some rollouts end early and are padded
    rollouts = sample(student, PROMPTS * 6, end_ids=ends, pad_id=20)
    assert {r.truncated for r in rollouts} == {True, False}
    for r in rollouts:
        assert not any(token in ends for token in r.ids[:-1])
        assert (r.ids[-1] in ends) != r.truncated
        assert not r.truncated or len(r.ids) == 16
        assert len(r.logprobs) == len(r.ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_batching_and_padding_do_not_change_greedy_rollouts(kind):
    student = model(kind)
    together = sample(student, temperature=0)
    apart = sample(student, temperature=0, batch_size=1)
    assert [r.ids for r in together] == [r.ids for r in apart]
    assert [r.logprobs for r in together] == [None] * 3
    for prompt, r in zip(PROMPTS, apart, strict=True):  # and they are the model's own argmax
        logits = student.eval()(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == r.ids


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sample_depends_on_its_prompt_and_its_seed_alone(kind):
    student = model(kind)
    prompts, seeds = PROMPTS * 3, list(range(10, 19))
    expected = [r.ids for r in sample(student, prompts, seeds=seeds)]
    assert len({tuple(ids) for ids in expected}) == 9
    for size in (1, 2, 100):
        assert [r.ids for r in sample(student, prompts, seeds=seeds, batch_size=size)] == expected
    others = sample(student, [[7] * 9, *reversed(prompts)], seeds=[3, *reversed(seeds)])
    assert [r.ids for r in others[:0:-1]] == expected
    longer = sample(student, prompts, seeds=seeds, max_new_tokens=20)
    assert [r.ids[:16] for r in longer] == expected
    assert all(a.ids != b for a, b in zip(sample(student, prompts, seeds=range(9)), expected, strict=True))


def test_torchs_random_state_is_neither_used_nor_changed():
    student = model()
    torch.manual_seed(1)
    first, state = sample(student), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(student) == first


def test_one_seed_for_each_prompt():
    with pytest.raises(ValueError, match="seeds must have one entry for each of 3 prompts, got 2"):
        sample(model(), seeds=[0, 1])


CUTS = [
    {},
    {"temperature": 1.7},
    {"temperature": 2.5, "top_k": 7},
    {"temperature": 2.5, "top_p": 0.8},
    {"temperature": 2.5, "min_p": 0.2},
    {"temperature": 3.0, "top_k": 12, "top_p": 0.85, "min_p": 0.15},
]


@pytest.mark.parametrize("cuts", CUTS)
def test_samples_follow_the_distribution_asked_for(cuts):
    student, count = model().eval(), 3000
    p = exact(student(torch.tensor([PROMPTS[0]])).logits[0, -1], **cuts)
    drawn = sample(student, [PROMPTS[0]] * count, max_new_tokens=1, batch_size=count, **cuts)
    seen = torch.bincount(torch.tensor([r.ids[0] for r in drawn]), minlength=VOCAB)
    assert not seen[p == 0].any()
    assert (p > 0).sum() > 3
    if cuts:
        assert not torch.allclose(p, exact(student(torch.tensor([PROMPTS[0]])).logits[0, -1]), atol=0.02)
    often = p * count >= 5
    observed = torch.cat([seen[often], seen[~often].sum()[None]]).double()
    expected = torch.cat([p[often], p[~often].sum()[None]]) * count
    chi_square = ((observed - expected) ** 2 / expected.clamp(min=1)).sum()
    degrees = int(often.sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("cuts", CUTS)
def test_log_probabilities_are_those_of_the_distribution_sampled_from(cuts):
    student = model().eval()
    for prompt, r in zip(PROMPTS, sample(student, end_ids=range(3, 10), **cuts), strict=True):
        logits = student(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
        expected = [exact(row, **cuts)[token].log().item() for row, token in zip(logits, r.ids, strict=True)]
        assert r.logprobs == pytest.approx(expected, abs=1e-4)
        assert min(r.logprobs) < -0.05 or len(r.ids) < 3


def test_positions_and_neighbours_draw_independently():
    student = model()
    torch.nn.init.zeros_(student.get_output_embeddings().weight)  # uniform over the vocabulary
    rollouts = sample(student, [[5]] * 200, end_ids=[])
    ids = torch.tensor([r.ids for r in rollouts])
    for drawn in (ids, (ids[:, 1:] - ids[:, :-1]) % VOCAB, (ids[1:] - ids[:-1]) % VOCAB):
        seen = torch.bincount(drawn.flatten(), minlength=VOCAB).double()
        expected = drawn.numel() / VOCAB
        assert ((seen - expected) ** 2 / expected).sum() < VOCAB + 4 * (2 * VOCAB) ** 0.5


def test_an_entry_without_probability_is_never_chosen():
    last = 1 - 2.0**-53
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9, last], dtype=torch.float64)
    assert inverse_cdf(p, u).tolist() == [1, 1, 3, 3, 3]
    many = torch.zeros(2, 200_000)
    many[:, 1::2] = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    many /= many.sum(-1, keepdim=True)
    chosen = inverse_cdf(many, torch.tensor([0.0, last], dtype=torch.float64))
    assert chosen[0] <= 3
    assert chosen[1] >= 199_990
    assert (many.gather(1, chosen[:, None]) > 0).all()
    broken = inverse_cdf(torch.full((1, 7), torch.nan), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= broken.item() < 7  # some id, so that the loss is what fails


@pytest.mark.parametrize("vocab", [1, 7, 64, 256, 1000, 4099, 151_936])
def test_the_entry_chosen_is_where_the_cumulative_sum_passes(vocab):
    g = torch.Generator().manual_seed(vocab)
    p = torch.randn(40, vocab, generator=g).mul(3).softmax(-1)
    u = torch.rand(40, generator=g, dtype=torch.float64)
    sums = (p.double() * 2.0**60).long().cumsum(-1)
    wanted = [int((own <= int(one * int(own[-1]))).sum()) for own, one in zip(sums, u.tolist(), strict=True)]
    assert inverse_cdf(p, u).tolist() == wanted


def test_a_cache_that_grows_holds_what_transformers_holds_and_copies_it_seldom():
    g = torch.Generator().manual_seed(0)
    own, stock, places = GrowingLayer(), DynamicLayer(), set()
    for step in range(3 * ROOM):
        if step in (ROOM // 2, 2 * ROOM + 5):
            rows = torch.tensor([0, 2]) if step > ROOM else torch.tensor([0, 0, 1, 2])
            own.batch_select_indices(rows)
            stock.batch_select_indices(rows)
        if step == ROOM + 9:
            own.crop(-4)
            stock.crop(-4)
        new = torch.randn(2, 3 if step == 0 else len(stock.keys), 2, 5 if step == 0 else 1, 4, generator=g)
        for found, wanted in zip(own.update(*new), stock.update(*new), strict=True):
            assert torch.equal(found, wanted)
        assert own.get_seq_length() == stock.get_seq_length()
        places.add(own.keys.data_ptr())
    assert len(places) <= 3 + 3  # as the room was used up, and as rows were chosen


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "sliding"])
def test_a_prompt_is_read_once_rows_leave_and_the_rollouts_are_those_of_one_call(kind, monkeypatch):
    window = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]}
    student = model("qwen3", **window) if kind == "sliding" else model(kind)
    prompts, ends = [p for p in PROMPTS for _ in range(4)], list(range(20, 26))
    shapes = []
    student.register_forward_pre_hook(
        lambda _, given, more: shapes.append(tuple(more["input_ids"].shape)), with_kwargs=True
    )
    together = sample(student, prompts, end_ids=ends, batch_size=12, max_new_tokens=40)
    assert shapes[0] == (3, 5)
    rows = [count for count, width in shapes[1:] if width == 1]
    assert len(rows) == len(shapes) - 1
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[-1] >= 1
    monkeypatch.setattr("opsd.engines.decoding._divisible_cache", lambda _: None)
    del shapes[:]
    plain = sample(student, prompts, end_ids=ends, batch_size=12, max_new_tokens=40)
    assert {count for count, _ in shapes} == {12}
    assert [r.ids for r in together] == [r.ids for r in plain]
    for a, b in zip(together, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_recurrent_state_stays_as_it_is():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    student = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4))
    rollouts = sample(student, [[5, 6, 7]] * 3, end_ids=range(20, 40))
    apart = [sample(student, [[5, 6, 7]], seeds=[seed], end_ids=range(20, 40))[0] for seed in range(3)]
    assert [r.ids for r in rollouts] == [r.ids for r in apart]


def test_vllm_gets_every_weight_as_it_acts_and_lora_stays_apart():
    base = model()
    names = [name for name, _ in base.named_parameters()]
    adapted = lora(base)
    given = dict(trained_weights(adapted))
    kept = {name: value.clone() for name, value in adapted.named_parameters()}
    assert list(given) == names
    assert all(torch.equal(value, kept[name]) for name, value in adapted.named_parameters())
    assert shapes(adapted) == shapes(model())
    with adapted.disable_adapter():
        off = dict(trained_weights(adapted))
    assert all(torch.equal(off[name], value) for name, value in model().named_parameters())
    assert not torch.equal(off["model.layers.0.mlp.up_proj.weight"], given["model.layers.0.mlp.up_proj.weight"])
    adapted.merge_and_unload()
    for name, value in base.named_parameters():
        assert torch.allclose(given[name], value, atol=1e-6)
    assert not torch.equal(given["model.layers.0.mlp.up_proj.weight"], kept[
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"])  # fmt: skip


def test_on_a_gpu_vllm_has_memory_only_while_it_writes(monkeypatch):
    run, said = run_of(model()), []

    class Vllm:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))

        def sleep(self, level):
            said.append(f"sleep {level}")

        def wake_up(self, tags):
            said.append(f"wake {tags[0]}")

        def apply_model(self, load):
            said.append("load")
            return [load(SimpleNamespace(named_parameters=dict, load_weights=dict))]

        def reset_prefix_cache(self):
            said.append("forget")

        def generate(self, prompts, params, use_tqdm):
            said.append("write")
            one = SimpleNamespace(token_ids=[5, 1], logprobs=[{i: SimpleNamespace(logprob=-1.0)} for i in (5, 1)])
            return [SimpleNamespace(outputs=[one])] * len(prompts)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = VllmEngine(Vllm(), run.engine, shapes(run.model), sleeps=True)
    engine.rest()
    rollouts = engine.rollouts(run, examples(), 1)
    assert [(r.ids, r.truncated) for r in rollouts] == [([5, 1], False)] * len(examples())
    assert said == ["sleep 2", "wake weights", "load", "wake kv_cache", "forget", "write", "sleep 2"]
    other = model(hidden_size=48)  # a teacher, say
    given = [[5, 6, 7]], Sampling(2, temperature=0.0), [0], 1
    assert [r.ids for r in engine.write(other, *given)] == [r.ids for r in run.engine.write(other, *given)]
    assert said[7:] == []


def test_vllm_is_not_given_weights_of_4_bits():
    run = run_of(model(), rollout__engine="vllm", model__load_in_4bit="true", lora__enabled="true")
    with pytest.raises(ConfigError, match=r"rollout\.engine is vllm with model\.load_in_4bit"):
        with_vllm(run.config, run.engine, run.model, 64)


def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    run, state = run_of(model()), torch.get_rng_state()
    with pytest.raises(ConfigError, match=r"rollout\.engine is vllm, which cannot be imported"):
        VllmEngine.of(run.config, run.engine, run.model, 64)
    assert torch.equal(torch.get_rng_state(), state)
