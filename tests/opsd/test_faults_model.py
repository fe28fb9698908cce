"""Models, teachers and adapters that are damaged or do not fit: one line that names what is wrong, before any work."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from _models import lora
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import opsd
from opsd.batching import writing_note
from opsd.cli import main, parse_overrides
from opsd.config import load_config
from opsd.data import Row
from opsd.engines import GenerateEngine
from opsd.options import ModelConfig, PromptsConfig
from opsd.plugins import Parts
from opsd.prompts import Prompter
from opsd.rollouts import Rollout, Sampling
from opsd.scoring import score, top_k_overlap
from opsd.setup import set_up
from opsd.step import micro_batches

TOKENS = ["<pad>", "<end>", "<unk>", "<bos>", *map(chr, range(10, 127))]


def words(post=None, chat=None, pad="<pad>", added=None, gap=0):
    """A tokenizer of one token per character, that writes `post` around each text; `gap` ids from 60 on have none."""
    tokens = {token: i + gap * (i >= 60) for i, token in enumerate(TOKENS)}
    raw = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if post:
        raw.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<bos>", 3), ("<end>", 1)])
    names = {"bos_token": "<bos>", "eos_token": "<end>", "unk_token": "<unk>", "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    if added:
        tokenizer.add_tokens(added) if isinstance(added, list) else tokenizer.add_special_tokens(added)
    tokenizer.chat_template = chat
    return tokenizer


def build(kind="llama", **changes):
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes}))


def write(directory, kind="llama", tokenizer=None, **changes):
    build(kind, **changes).save_pretrained(directory)
    (tokenizer or words()).save_pretrained(directory)
    return directory


def rows(directory, problem="1+1"):
    row = {"problem": problem, "solution": "s", "answer": "2"}
    (directory / "d.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    return directory / "d.jsonl"


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(file, change):
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def command(model, data, *options, evaluate=False):
    if evaluate:
        return [
            "eval",
            f"--model={model}",
            f"--data={data}",
            "--run.device=cpu",
            "--rollout.max-new-tokens=2",
            *options,
        ]
    given = [f"--model.path={model}", f"--data.train={data}", f"--run.dir={data.parent / 'out'}", "--run.device=cpu"]
    given += ["--optim.steps=1", "--optim.batch-size=2", "--rollout.max-new-tokens=2"]
    return ["train", *given, *options]


def refused(words, capsys):
    """The one line that `words` are refused with."""
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole")


def cut(directory):
    file = next(directory.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return f"{file.name}: "


def widen(directory):
    change_json(directory / "config.json", vocab_size=128)
    return "lm_head.weight of shape (121, 16); accepted by its config.json: (128, 16)"


def untie(directory):
    change_tensors(directory / "model.safetensors", lambda t: {n: t[n] for n in t if n != "lm_head.weight"})
    return "its weights lack lm_head.weight; accepted: every tensor"


def drop_mlp(directory):
    change_tensors(directory / "model.safetensors", lambda t: {n: t[n] for n in t if "layers.1.mlp" not in n})
    return "its weights lack model.layers.1.mlp.down_proj.weight, "


def spoil(directory):
    def change(tensors):
        tensors["model.norm.weight"][3] = torch.nan
        return tensors

    change_tensors(directory / "model.safetensors", change)
    return "model.norm.weight holds 1 of 16 values that are infinite or not a number; accepted: finite"


@pytest.mark.parametrize("damage", [cut, widen, untie, drop_mlp, spoil])
def test_damaged_weights_are_named_wherever_a_model_is_loaded(whole, tmp_path, capsys, damage):
    data, bad = rows(tmp_path), Path(shutil.copytree(whole, tmp_path / "bad"))
    told = damage(bad)
    for words, option in (
        (command(bad, data), "model.path"),
        (command(bad, data, evaluate=True), "model.path"),
        (command(whole, data, "--teacher.kind=model", f"--teacher.path={bad}"), "teacher.path"),
    ):
        line = refused(words, capsys)
        assert line.startswith(f"opsd: {option} '{bad}': ")
        assert told in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"vocab_size": "many", "max_new_tokens": -1, "model": 3}'])
def test_a_damaged_description_is_one_line(whole, tmp_path, capsys, name, text):
    (whole / name).write_text(text)
    for evaluate in (False, True):
        assert str(whole) in refused(command(whole, rows(tmp_path), evaluate=evaluate), capsys)


def lack(directory):
    change_tensors(directory / "adapter_model.safetensors", lambda t: {n: t[n] for n in t if "layers.1.mlp" not in n})
    return "layers.1.mlp.down_proj.lora_A"


def spoil_adapter(directory):
    def change(tensors):
        next(iter(tensors.values())).view(-1)[0] = torch.inf
        return tensors

    change_tensors(directory / "adapter_model.safetensors", change)
    return "values that are infinite or not a number"


def shrink(directory):
    change_json(directory / "adapter_config.json", r=2)
    return "size mismatch"


@pytest.mark.parametrize("damage", [cut, lack, spoil_adapter, shrink])
def test_a_damaged_adapter_neither_is_evaluated_nor_teaches(whole, tmp_path, capsys, damage):
    bad = tmp_path / "adapter"
    adapted = lora(build())
    adapted.peft_config["default"].base_model_name_or_path = str(whole)
    adapted.save_pretrained(bad)
    words().save_pretrained(bad)
    told, data = damage(bad), rows(tmp_path)
    for given, option in (
        (command(bad, data, evaluate=True), "model.path"),
        (command(whole, data, "--teacher.kind=model", f"--teacher.path={bad}"), "teacher.path"),
    ):
        line = refused(given, capsys)
        assert line.startswith(f"opsd: {option} '{bad}': ")
        assert told in line


def test_the_base_of_an_adapter_is_looked_at_too(whole, tmp_path, capsys):
    adapted = lora(build())
    adapted.peft_config["default"].base_model_name_or_path = str(whole)
    adapted.save_pretrained(tmp_path / "adapter")
    words().save_pretrained(tmp_path / "adapter")
    told, data = drop_mlp(whole), rows(tmp_path)
    assert told in refused(command(tmp_path / "adapter", data, evaluate=True), capsys)
    other = write(tmp_path / "other")
    given = command(other, data, "--teacher.kind=model", f"--teacher.path={tmp_path / 'adapter'}")
    assert told in refused(given, capsys)


def test_padding_without_a_row_in_the_embedding_is_not_used(tmp_path):
    tokenizer = words(pad=None, added={"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == len(TOKENS)
    model, data = write(tmp_path / "m", tokenizer=tokenizer), tmp_path / "d.jsonl"
    row = {"problem": "1", "solution": "a solution", "answer": "2"}
    data.write_text(json.dumps(row) + "\n" + json.dumps(row | {"problem": "longer"}) + "\n")
    assert main(command(model, data)) == 0
    assert main(command(model, data, evaluate=True)) == 0


def test_prompts_with_a_token_that_the_embedding_lacks_are_named(tmp_path, capsys):
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}<|new|>"
    model, data = write(tmp_path / "m", tokenizer=words(chat=chat, added=["<|new|>"])), rows(tmp_path)
    told = "d.jsonl:1: the student's prompt has id 121, '<|new|>', which has no row in the model's embedding; "
    for evaluate in (False, True):
        line = refused(command(model, data, evaluate=evaluate), capsys)
        assert f"{told}accepted: 0 to 120" in line


@pytest.mark.parametrize("end", [-1, 121, [1, 500], "x"])
def test_end_ids_that_no_answer_can_have_are_named(whole, tmp_path, capsys, end):
    change_json(whole / "generation_config.json", eos_token_id=end)
    named = repr(end[-1] if isinstance(end, list) else end)
    for evaluate in (False, True):
        line = refused(command(whole, rows(tmp_path), evaluate=evaluate), capsys)
        assert str(whole) in line
        assert f"eos_token_id {named} of generation_config.json has no row" in line
        assert "accepted: 0 to 120" in line


def test_an_end_token_of_the_tokenizer_alone_is_named(tmp_path, capsys):
    model = write(tmp_path / "m", tokenizer=words(added={"eos_token": "<|new|>"}))
    line = refused(command(model, rows(tmp_path)), capsys)
    assert "eos_token_id 121 of its tokenizer has no row" in line


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_columns_without_a_token_are_never_written(temperature):
    model = build(vocab_size=160)
    with torch.no_grad():  # the likeliest by far, whatever the prompt
        model.lm_head.weight[121:] = 0
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(160).index_fill(0, torch.arange(121, 160), 20.0))
    engine = GenerateEngine.of(model, words(), ModelConfig())
    written = engine.write(model, [[5, 6], [7]], Sampling(8, temperature), [0, 1], 2)
    assert max(max(rollout.ids) for rollout in written) < 121
    if temperature:
        assert all(math.isclose(p, -math.log(121), rel_tol=1e-4) for rollout in written for p in rollout.logprobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_between_tokens_that_have_none_are_never_written(temperature):
    gapped, model = words(gap=10), build(vocab_size=len(TOKENS) + 10)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(131).index_fill(0, torch.arange(60, 70), 20.0))
    engine = GenerateEngine.of(model, gapped, ModelConfig())
    assert engine.holes == tuple(range(60, 70))
    assert writing_note(engine) == ["vocabulary: 10 ids, 60 first, have no token: never written, and in no softmax"]
    written = engine.write(model, [[5, 6], [7]], Sampling(8, temperature), [0, 1], 2)
    assert all(not 60 <= i < 70 for rollout in written for i in rollout.ids)
    assert GenerateEngine.of(build(), words(), ModelConfig()).holes == ()


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2"])  # plain, a head with a bias, one with a softcap
@pytest.mark.parametrize("gap", [0, 10])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--teacher.kind=model",),
        ("--teacher.kind=ema",),
        ("--objective.recipe=purified",),
        ("--lora.enabled=true",),
    ],
    ids=["base", "model", "ema", "purified", "lora"],
)
def test_columns_without_a_token_take_no_part_in_the_loss(tmp_path, kind, gap, options):
    gapped = words(gap=gap)
    model = write(tmp_path / "m", kind, gapped, vocab_size=160, tie_word_embeddings=False)
    if "--teacher.kind=model" in options:
        options = (*options, f"--teacher.path={write(tmp_path / 't', kind, gapped, vocab_size=168)}")
    words_of = [*command(model, rows(tmp_path))[1:], *options]
    setup = set_up(load_config(None, parse_overrides(words_of)), Parts())
    run = setup.run
    rollouts = [Rollout([5, 6, 7], True)] * 2
    (batch,) = micro_batches(run, setup.examples, rollouts)
    heads = {head.weight.data_ptr(): head for head in (run.head, run.teacher.head)}.values()
    tokens = torch.tensor(sorted(gapped.get_vocab().values()))
    others = torch.ones(160, dtype=torch.bool).index_fill(0, tokens, False)

    def loss():
        student, teachers = score(run, batch)
        value, _ = run.recipe.loss(student, teachers, batch, 6)
        return value, top_k_overlap(student, teachers["teacher"]).item()

    before, overlap = loss()
    shift = 3 * torch.randn(160, 16)
    with torch.no_grad():
        for head in heads:
            head.weight[others] += shift[others]
            if head.bias is not None:
                head.bias[others] += 5.0
    value, again = loss()
    assert (value.item(), again) == (before.item(), overlap)
    if run.head.weight.requires_grad:
        grads = torch.autograd.grad(value, [t for t in (run.head.weight, run.head.bias) if t is not None])
        assert all(grad[others].eq(0).all() and grad[tokens].abs().sum() > 0 for grad in grads)
    with torch.no_grad():
        for head in heads:
            head.weight[tokens] += shift[tokens]
    assert loss()[0] != before


def test_whatever_the_columns_without_a_token_are_a_run_is_the_same(tmp_path):
    """Seen from its records, which hold the loss, its statistics and the tokens' alternatives; so is a cache."""

    def trained(name, bias):
        directory = tmp_path / name
        model = write(directory / "m", "phi", words(gap=10), vocab_size=131)
        change_tensors(
            model / "model.safetensors",
            lambda t: t | {"lm_head.bias": t["lm_head.bias"].index_fill(0, torch.arange(60, 70), bias)},
        )
        data, cache = rows(directory), f"--output={directory / 'cache'}"
        assert main(["cache-teacher", *command(model, data)[1:], cache, "--objective.top-k=5"]) == 0
        cached = ("--teacher.kind=cached", f"--teacher.path={directory / 'cache'}", "--objective.tail-bucket=true")
        for number, options in enumerate([(), cached]):
            assert (
                main([*command(model, data), *options, f"--run.dir={directory / str(number)}", "--optim.steps=2"]) == 0
            )
        kept = [directory / f"{number}/{file}.jsonl" for number in "01" for file in ("metrics", "samples")]
        records = [json.loads(line) for file in kept for line in file.read_text().splitlines()]
        timed = re.compile("second|source|peak_memory")
        return [{name: value for name, value in record.items() if not timed.search(name)} for record in records]

    for name in "ab":
        (tmp_path / name).mkdir()
    one, other = trained("a", 0.0), trained("b", 20.0)
    assert len(one) > 4
    assert one == other


def test_rollouts_of_ones_own_with_an_id_without_a_token_are_refused(tmp_path, capsys):
    model = write(tmp_path / "m", tokenizer=words(gap=10), vocab_size=131)
    options = load_config(None, parse_overrides(command(model, rows(tmp_path))[1:]))
    with pytest.raises(ValueError, match="token id 65; accepted: ints from 0 to 130, but the 10 without a token"):
        opsd.train(options, rollouts=lambda run, examples, number: [Rollout([65], True)] * len(examples), quiet=True)


def test_target_modules_that_match_no_layer_are_named(tmp_path, capsys):
    model, data = write(tmp_path / "m", "phi3", bos_token_id=3), rows(tmp_path)
    line = refused(command(model, data, "--preset=paper"), capsys)
    assert "lora.target_modules: q_proj, k_proj, v_proj, gate_proj, up_proj match no layer of Phi3ForCausalLM" in line
    assert "accepted: all-linear, or names among down_proj, gate_up_proj, o_proj, qkv_proj" in line
    assert main(command(model, data, "--preset=paper", "--lora.target-modules=qkv_proj,o_proj")) == 0


@pytest.mark.parametrize(("post", "text", "ids"), [
    ("<bos> $A", "1+1", [3, None]),
    ("<bos> $A", "<bos>1+1", [3, None]),
    ("$A <end>", "1+1", [None]),
    ("<bos> $A <end>", "<bos>1+1", [3, None]),
    ("$A", "<bos>1+1", [3, None]),
    ("$A <end>", "1+1<end>", [None, 1]),  # the text's own stays
])  # fmt: skip
def test_a_prompt_begins_once_and_does_not_end(post, text, ids):
    tokenizer = words(post)
    config = PromptsConfig(student="{problem}", chat="off")
    example = Prompter(tokenizer, config).encode(Row(text, "s", "2", None, "d:1"))
    digits = tokenizer.convert_tokens_to_ids(["1", "+", "1"])
    assert example.student == [token for one in ids for token in (digits if one is None else [one])]


def test_prompts_that_a_template_brings_to_an_end_are_warned_of(tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"
    model = write(tmp_path / "m", tokenizer=words(chat=template))
    options = [("model.path", str(model)), ("data.train", str(rows(tmp_path))), ("prompts.student", "{problem}")]
    options += [("prompts.teacher", "{problem}{solution}")]
    warnings = set_up(load_config(None, options), Parts()).warnings
    assert "2 student prompts of data.train end with an end token, after which a model stops" in warnings
    assert "2 teacher prompts of data.train end with an end token, after which a model stops" in warnings


def test_a_tokenizer_that_fails_at_any_text_is_named(tmp_path, capsys):
    model = write(tmp_path / "model")
    change_json(model / "tokenizer_config.json", model_max_length=[])
    said = refused(command(model, rows(tmp_path)), capsys)
    assert said.startswith(f"opsd: model.path '{model}': no tokenizer can be loaded: ")


@pytest.mark.parametrize("rank", [len(TOKENS) + 1, 10**9])
def test_a_rank_beyond_every_layer_is_refused(rank, whole, tmp_path, capsys):
    argv = command(whole, rows(tmp_path), "--lora.enabled")
    most = f"accepted: 1 to {len(TOKENS)}, the largest dimension of the model's matrices"
    assert refused([*argv, f"--lora.r={rank}"], capsys) == f"opsd: lora.r is {rank}; {most}"
    assert main([*argv, f"--lora.r={len(TOKENS)}"]) == 0


def test_a_config_that_cannot_be_saved_is_refused_before_the_training(whole, tmp_path, capsys):
    change_json(whole / "config.json", output_attentions=True)
    argv, out = command(whole, rows(tmp_path)), tmp_path / "out"
    said = refused(argv, capsys)
    assert said.startswith(f"opsd: model.path '{whole}': its config.json can be loaded, but not be saved")
    assert "output_attentions" in said
    assert not out.exists()
    assert main([*argv, "--lora.enabled"]) == 0
    assert (out / "model" / "adapter_config.json").is_file()


@pytest.mark.parametrize("evaluate", [False, True])
def test_a_config_that_only_fails_when_the_model_runs_is_refused(evaluate, whole, tmp_path, capsys):
    change_json(whole / "config.json", sliding_window=[])
    said = refused(command(whole, rows(tmp_path), evaluate=evaluate), capsys)
    assert said.startswith(f"opsd: model.path '{whole}': the model is loaded, but fails at its first tokens: TypeError")
    assert not (tmp_path / "out").exists()


def test_a_description_with_a_value_of_pages_is_told_briefly(tmp_path, capsys):
    model = write(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": {"x" * 9000: 1}}))
    assert main(command(model, rows(tmp_path))) == 2
    said = capsys.readouterr().err
    assert "'attention_dropout'" in said
    assert len(said) < 3000
