"""Models, teachers and adapters that are damaged or do not fit: one line that names what is wrong, before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from _models import lora
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from opsd.cli import main

TOKENS = ["<pad>", "<end>", "<unk>", "<bos>", *map(chr, range(10, 127))]


def words(post=None, chat=None, pad="<pad>", added=None):
    """A tokenizer of one token per character, that writes `post` around each text."""
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
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
