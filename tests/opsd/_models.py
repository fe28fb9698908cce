"""Tiny random models and a character-level tokenizer."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd.config import load_config
from opsd.data import Row
from opsd.engines import GenerateEngine
from opsd.objective import make_recipe
from opsd.prompts import Example
from opsd.run import Run
from opsd.teachers import make_teacher
from opsd_kernels import lm_head_of

torch.set_num_threads(1)  # several threads on models this small wait for each other more than they compute

CHARACTERS = string.digits + string.ascii_letters + " \n+-=*?.,:;!(){}[]\\'\"/<>_"
VOCAB = len(CHARACTERS) + 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        wrapped.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    return wrapped


def model(kind: str = "llama", seed: int = 0, **changes):
    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, **changes)
        )
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "nemotron": (NemotronConfig, NemotronForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    built = cls(config(**{**SIZES, **changes}))
    for name, parameter in built.named_parameters():  # peaked next-token distributions, as real models have
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def lora(base):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.to(next(base.parameters()).dtype)


def write_rows(path: Path, count: int = 8, **extra: str) -> Path:
    lines = []
    for i in range(count):
        row = {"problem": f"{i}+{i}?", "solution": f"{i}+{i} is {2 * i}", "answer": str(2 * i), **extra}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_model(directory: Path, kind: str = "llama", chat: bool = False) -> Path:
    model(kind).save_pretrained(directory)
    tokenizer(chat).save_pretrained(directory)
    return directory


def run_of(student, **options) -> Run:
    """A `Run` around `student`; `options` are section__option=value."""
    overrides = [("model.path", "given"), ("data.train", "given"), ("rollout.max_new_tokens", 12)]
    overrides += [(name.replace("__", "."), value) for name, value in options.items()]
    config = load_config(None, overrides)
    words = tokenizer()
    teacher = make_teacher(config, student, words)
    engine = GenerateEngine([1], 0, config.model)
    return Run(config, student, words, lm_head_of(student), teacher, engine, make_recipe(config), torch.device("cpu"))


def examples(lengths=((3, 9), (7, 12), (2, 5), (5, 20), (4, 6)), seed: int = 0) -> list[Example]:
    """Examples of random ids with the given student and teacher prompt lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=draw).tolist()

    row = Row("p", "s", "a", None, "file:1")
    return [Example(row, ids(s), ids(t)) for s, t in lengths]
