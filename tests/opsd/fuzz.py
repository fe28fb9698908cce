"""Random inputs for the command: data files and directories, YAML files, options, files of a model and an adapter.

Whatever it is given, the command ends with success or with exit code 2 and one line that names what is wrong: no
traceback, no hang, and nothing written but the run directory, this neither where the input is refused.

    python tests/opsd/fuzz.py --inputs 20000 [--kind data] [--seed 0]

Inputs run in this process, up to the first step of a run, those of a model to the end of a run of one step. A failing
input is made as small as hypothesis can, and printed with the command that finds it again.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import gzip
import io
import json
import math
import os
import resource
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: a path of random text must not be asked for

import itertools

import hypothesis
import hypothesis.strategies as st
import torch
import yaml
from _models import tokenizer, write_model, write_rows

from opsd.cli import main
from opsd.config import SECTIONS, is_flag
from opsd.data import FIELDS, SYNONYMS
from opsd.errors import ConfigError
from opsd.options import DataConfig, PromptsConfig
from opsd.prompts import Prompter, read_examples

SECONDS = 20
"""Of the processor; six times as many by the clock, since a busy machine makes none of this wrong."""

MEMORY = 16 << 30
"""Beyond this address space, an allocation fails as on a machine that has no more."""

BLOCK = 250
"""Inputs of one seed."""


class Failure(Exception):
    """What an input did that it must not."""


class Hang(BaseException):
    """Not an Exception, which some reader would take for a damaged file."""


class Ready(BaseException):
    """The run is set up, its first step would come next."""


# --- values ---------------------------------------------------------------------------------------------------------

odd_text = st.one_of(
    st.sampled_from(
        ["", " ", "\0", "\n", "none", "true", "é\u202e", "\ud800", "💥" * 40, "{}", "{problem}", "[", "a,b"]
    ),
    st.sampled_from(["\\boxed{", "(", "(a)", "x:y", "os:getcwd", "x.py:f", "../..", "x" * 5000, "<end>", "<pad><pad>"]),
    st.text(st.characters(exclude_characters="/"), max_size=12),  # no path out of the directory
)
odd_numbers = st.one_of(
    st.sampled_from([0, -1, 1, 2, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400]),
    st.sampled_from([0.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5, 1e-7]),
    st.integers(-5, 5000),
    st.floats(),
)
scalars = st.one_of(st.none(), st.booleans(), odd_numbers, odd_text)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3), max_leaves=6
)


def damaged(draw: Any, content: bytes) -> bytes:
    """`content` cut, or with a byte changed, or as it is."""
    how = draw(st.sampled_from(["whole"] * 3 + ["cut", "byte", "doubled", "zeros"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:place]
    if how == "byte":
        return content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    return {"doubled": content * 2, "zeros": content + bytes(9)}.get(how, content)


# --- data files -----------------------------------------------------------------------------------------------------

messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant", "tool", ""]), "content": odd_text}
        ),
        st.dictionaries(st.sampled_from(["role", "content", "x"]), values, max_size=3),
    ),
    max_size=3,
)
GOOD = {"problem": "1+1?", "solution": "2", "answer": "2"}
cells = st.one_of(st.sampled_from(["1+1", "2", 2, 2.0]), odd_text, messages, values)
rows = st.dictionaries(st.sampled_from([*FIELDS, *SYNONYMS, "other", ""]), cells, max_size=5)
mutated = rows.map(lambda row: {**GOOD, **row})


@st.composite
def lines(draw: Any) -> bytes:
    """One line of a data file."""
    row = draw(st.sampled_from([GOOD]) | mutated | rows)
    plain = json.dumps(row, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    odd = [
        plain[:-1] + b', "problem": "again"}',
        plain[:-1] + b', "more": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        plain[:-1] + b', "answer": ' + b"9" * draw(st.sampled_from([400, 4300, 4301, 9000])) + b"}",
        plain[:-1] + b', "answer": 1e999999999}',
        b"[" * 100_000,
        b"\xef\xbb\xbf" + plain,
        draw(st.binary(max_size=20)),
        json.dumps(draw(values)).encode(),
    ]
    return draw(st.sampled_from([plain, plain, *odd]))


@cache
def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: [value] * 3 for name, value in GOOD.items()}), file)
    return file.getvalue()


class DataFile(NamedTuple):
    name: str
    content: bytes
    options: Mapping[str, Any]
    required: tuple[str, ...]
    chat: bool


@st.composite
def data_files(draw: Any) -> DataFile:
    content = draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\0"])).join(draw(st.lists(lines(), max_size=4)))
    kinds: dict[str, Callable[[], bytes]] = {
        "lines": lambda: content,
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "utf-16": lambda: content.decode(errors="replace").encode("utf-16"),
        "gzip": lambda: gzip.compress(content),
        "array": lambda: json.dumps(
            [draw(mutated) for _ in range(2)], indent=draw(st.sampled_from([None, 1]))
        ).encode(),
        "csv": lambda: b"problem,solution,answer\n1+1,2,2\n",
        "parquet": parquet,
        "bytes": lambda: draw(st.binary(max_size=200)),
        "empty": lambda: b"",
    }
    kind = draw(st.sampled_from(["lines"] * 5 + [*kinds]))
    names = ["d.jsonl", "d.json", "d.csv", "d.gz", "d", "d.parquet", "d/part-0.jsonl", "d/train-0.parquet", "d/x"]
    names = ["d.parquet"] * 5 + names if kind == "parquet" else ["d.jsonl"] * 9 + names
    options = {
        "skip_bad_rows": draw(st.booleans()),
        "too_long": draw(st.sampled_from(["error", "drop"])),
        "max_prompt_tokens": draw(st.sampled_from([4096, 150, 1])),
        "columns": draw(st.none() | st.none() | st.lists(odd_text | st.sampled_from(["problem=other"]), min_size=1)),
    }
    required = draw(st.sampled_from([("problem", "solution"), ("problem", "answer")]))
    return DataFile(draw(st.sampled_from(names)), damaged(draw, kinds[kind]()), options, required, draw(st.booleans()))


@cache
def prompter(chat: bool) -> Prompter:
    return Prompter(tokenizer(chat), PromptsConfig())


def read_data(given: DataFile, scratch: Path) -> None:
    path = scratch / given.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(given.content)
    top = scratch / Path(given.name).parts[0]
    with watched(scratch):
        try:
            read = read_examples(DataConfig(**given.options), prompter(given.chat), str(top), required=given.required)
        except ConfigError as error:
            check_message(str(error), (str(top), "data."))
        else:
            if not all(e.student and (e.teacher or "solution" not in given.required) for e in read.examples):
                raise Failure("an example has an empty prompt")


# --- options and YAML -----------------------------------------------------------------------------------------------

NAMES = [f"{section}.{name}" for section, of in SECTIONS.items() for name in of.model_fields]
OUT = "run.dir"
NAMED = (*NAMES, *SECTIONS, "--", "c.yaml", "train.jsonl", "model/", "preset", "unexpected", "unknown option")
"""What a message may name."""


def value_of(name: str) -> st.SearchStrategy[Any]:
    """Odd values of an option, and such as it takes."""
    section, _, option = name.partition(".")
    field = SECTIONS[section].model_fields[option]
    schema = SECTIONS[section].model_json_schema()["properties"][option]
    takes = [schema.get("enum", []), *(kind.get("enum", []) for kind in schema.get("anyOf", []))]
    known = [field.default, *(value for kind in takes for value in kind)]
    if name in ("model.path", "teacher.path"):
        known += ["model", "model/config.json", "train.jsonl", ".", "/", "/dev/null", "no/such"]
    elif name in ("data.train", "data.eval"):
        known += ["train.jsonl", "model", ".", "/dev/null", "/dev/zero", "/proc/self/mem", "no/such"]
    elif name == OUT:
        known += ["out", "out/deep/er", "model", "train.jsonl", ".", "/proc/out", "/dev/null/out", "x" * 250]
    elif name == "objective.recipe":
        known += ["lightning", "sdft", "opd"]
    elif option.endswith(("args", "options")):
        known += ['{"beta": 0.5}', '{"enable_thinking": false}', "{}", '{"a": 1, "a": 2}', "[" * 5000]
    return st.sampled_from(known) | scalars


@st.composite
def choices(draw: Any, most: int = 4) -> list[tuple[str, Any]]:
    """Some options with values."""
    names = draw(st.lists(st.sampled_from(NAMES), max_size=most))
    return [(name, draw(value_of(name))) for name in names]


class Command(NamedTuple):
    command: str
    words: list[str]
    config: bytes | None


@st.composite
def command_lines(draw: Any) -> Command:
    words: list[str] = []
    for name, value in draw(choices()):
        text = str(value) if not isinstance(value, tuple) else ",".join(map(str, value))
        text = text.replace("\0", "\1") if draw(st.booleans()) else text
        name = name.replace("_", "-") if draw(st.booleans()) else name
        form = draw(st.sampled_from(["two", "one", "flag"] if is_flag(name) else ["two", "one", "one"]))
        words += {"two": [f"--{name}", text], "one": [f"--{name}={text}"], "flag": [f"--{name}"]}[form]
    odd = st.sampled_from(["--", "--optim", "--optim.lrr=1", "-x", "--model.path", "--config", "--=", "--.=", "--help"])
    words += draw(st.just([]) | st.just([]) | st.just([]) | st.lists(odd | odd_text, max_size=2))
    return Command(draw(st.sampled_from(["train", "train", "eval"])), words, None)


LAUGHS = "[&a [x, x], " + ", ".join(f"&{b} [*{a}, *{a}]" for a, b in itertools.pairwise(string.ascii_lowercase)) + "]"
"""Written out, it has 2^26 entries."""

FRAGMENTS = [
    "optim: &o {lr: 1}\nlora: *o\n",
    "optim: {<<: {lr: 1}, steps: 2}\n",
    "optim: &o {steps: *o}\n",
    "optim: &o [*o]\n",
    "optim: !!python/object/apply:os.getcwd []\n",
    "optim: !!binary Z\n",
    "optim: !!set {a, b}\n",
    "optim: {? [1, 2] : 3}\n",
    "optim: {1: 2, null: 3, true: 4}\n",
    "? {a: 1}\n: 2\n",
    "optim: {lr: .nan, betas: [.inf, 1]}\n",
    "optim: {lr: 1:30:00, steps: 0o17}\n",
    "eval: {temperature: 2026-11-26T00:00:00Z}\n",
    "optim:\n\tlr: 1\n",
    "--- {}\n--- {}\n",
    "preset: [paper]\n",
    "preset: paper\n",
    "%YAML 9.9\n---\n{}\n",
    "data: {columns: {problem: question, 1: 2}}\n",
    "prompts: {student_chat_args: {a: 2026-11-26}}\n",
    "objective: {recipe: lightning, recipe_options: {beta: .nan}}\n",
    f"optim: {LAUGHS}\n",
    f"x: {LAUGHS}\n",
    f"optim: {{steps: {LAUGHS}}}\n",
    f"prompts: {{student_chat_args: {{a: {LAUGHS}}}}}\n",
    "optim: {steps: &a [1, &b [*a, *a]]}\n",
    "{" * 500,
    "- " * 2000,
    "'" + "x" * 70000,
]


@st.composite
def yaml_files(draw: Any) -> Command:
    sections: dict[Any, Any] = {}
    for name, value in draw(choices()):
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = draw(st.just(value) | st.just(value) | values)
    sections |= draw(st.just({}) | st.just({}) | st.dictionaries(st.sampled_from(list(SECTIONS)) | odd_text, values))
    dumped = yaml.dump(
        sections, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([None, True]))
    )
    fragment = draw(st.just("") | st.just("") | st.sampled_from(FRAGMENTS))
    text = draw(st.sampled_from([dumped + fragment, fragment + dumped, fragment or dumped]))
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16"])), errors="surrogatepass")
    content = draw(st.just(content) | st.just(content) | st.binary(max_size=60))
    return Command(draw(st.sampled_from(["train", "train", "eval", "print"])), [], damaged(draw, content))


SMALL = ["--rollout.max-new-tokens=2", "--run.device=cpu", "--optim.batch-size=2", "--optim.steps=1"]


def run_command(given: Command, scratch: Path, *, to_end: bool = False) -> None:
    if not (scratch / "model").exists():
        shutil.copytree(good_model(), scratch / "model")
    write_rows(scratch / "train.jsonl", 2)
    inputs = ["--model.path=model", "--data.train=train.jsonl", *SMALL]
    argv = ["train", *inputs, "--run.dir=out"]
    if given.command == "eval":
        argv = ["eval", "--model=model", "--data=train.jsonl", *SMALL[:2]]
    if given.command == "print":
        argv = ["train", "--print-config"]
    if given.config is not None:
        (scratch / "c.yaml").write_bytes(given.config)
        # What the file says of these counts, so that it has to say them; another's answer would come first.
        argv = [*argv, "--config=c.yaml"] if given.command != "train" else ["train", *SMALL, "--config=c.yaml"]
        if given.command == "train" and b"path" not in given.config:
            argv = [*argv, *inputs[:2]]
    argv = [*argv, *given.words]
    before, said, complaint = tree(scratch), io.StringIO(), io.StringIO()
    with watched(scratch), redirect_stdout(said), redirect_stderr(complaint), stopped_at_the_first_step(to_end):
        try:
            code = main(argv)
        except Ready:
            code = 0
        except SystemExit as end:  # argparse: for --help, or a word of its own
            code = int(end.code or 0)
            if code == 2 and "error:" not in complaint.getvalue():
                raise Failure(f"exit code 2 without a word: {complaint.getvalue()!r}") from None
            complaint = io.StringIO("opsd: --words of argparse\n")
    if code not in (0, 2):
        raise Failure(f"exit code {code}: {complaint.getvalue()}")
    after = tree(scratch)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if code == 2:
        _, _, message = complaint.getvalue().rpartition("opsd: ")
        check_message(message.rstrip("\n"), (*NAMED, *given.words, *(word.partition("=")[2] for word in given.words)))
        if changed:
            raise Failure(f"refused, and yet {sorted(changed)} changed")
    elif touched := changed & before.keys():
        raise Failure(f"its own input was changed: {sorted(touched)}")


@contextmanager
def stopped_at_the_first_step(to_end: bool) -> Iterator[None]:
    stop = mock.Mock(side_effect=Ready)
    if to_end:
        yield
    else:
        # Of no model at all the embedded one is made, in a cache and in minutes.
        names = "opsd.trainer._run", "opsd.evaluation.Evaluator.answers", "opsd.tiny.prepare"
        with mock.patch(names[0], stop), mock.patch(names[1], stop), mock.patch(names[2], stop):
            yield


# --- the JSON files of a model ---------------------------------------------------------------------------------------


@cache
def good_model() -> Path:
    """Where one is, with which a run and an evaluation have been made: that builds and caches what later ones need."""
    base = Path(tempfile.mkdtemp(prefix="opsd-fuzz-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    where = [f"--model.path={write_model(base / 'model')}", f"--data.train={write_rows(base / 'train.jsonl', 2)}"]
    with redirect_stdout(io.StringIO()):
        code = main(["train", *where, f"--run.dir={base / 'out'}", "--lora.enabled", *SMALL])
    assert code == 0
    return base / "model"


@cache
def json_files() -> dict[str, Any]:
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    return {name: json.loads((good_model() / name).read_text()) for name in names}


GENERATION = [
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "num_beams", "use_cache",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "forced_eos_token_id", "forced_bos_token_id", "sequence_bias",
    "num_return_sequences",
    "output_scores", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "stop_strings",
    "cache_implementation", "cache_config", "compile_config", "watermarking_config", "guidance_scale", "penalty_alpha",
    "early_stopping", "constraints", "transformers_version", "decoder_start_token_id", "begin_suppress_tokens",
    "renormalize_logits", "num_beam_groups", "max_time", "exponential_decay_length_penalty", "assistant_early_exit",
]  # fmt: skip
CONFIG = [
    "torch_dtype", "dtype", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias",
    "architectures", "auto_map", "quantization_config", "text_config", "is_decoder", "use_cache", "pretraining_tp",
    "sliding_window", "layer_types", "attn_implementation", "pruned_heads", "output_attentions", "id2label",
    "num_labels", "head_dim", "partial_rotary_factor", "max_position_embeddings", "tokenizer_class", "rms_norm_eps",
]  # fmt: skip
TOKENIZER = [
    "chat_template", "model_max_length", "pad_token", "eos_token", "tokenizer_class", "padding_side",
    "added_tokens_decoder", "extra_special_tokens", "auto_map", "model_input_names",
]  # fmt: skip
MORE = {"config.json": CONFIG, "generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}
ids = st.sampled_from([0, 1, 2, 69, 70, 200, -1, 2**63, [1], [0, 1], [], [None], "1", 1.0, True, [[1]]])


class ModelFile(NamedTuple):
    name: str
    content: bytes
    command: str


@st.composite
def model_files(draw: Any) -> ModelFile:
    name = draw(st.sampled_from(["config.json"] * 3 + ["generation_config.json"] * 3 + ["tokenizer_config.json"]))
    content = dict(json_files()[name])
    for key in draw(st.lists(st.sampled_from([*content, *MORE[name]]), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            content.pop(key, None)
        else:
            content[key] = draw(ids if key.endswith("_id") and draw(st.booleans()) else values)
    text = json.dumps(content).encode()
    text = draw(st.sampled_from([text] * 8 + [json.dumps(draw(values)).encode(), draw(st.binary(max_size=30))]))
    return ModelFile(name, damaged(draw, text), draw(st.sampled_from(["train", "train", "eval"])))


def load_model_files(given: ModelFile, scratch: Path) -> None:
    shutil.copytree(good_model(), scratch / "model")
    (scratch / "model" / given.name).write_bytes(given.content)
    run_command(
        Command(given.command, ["--run.save=true"] if given.command == "train" else [], None), scratch, to_end=True
    )


# --- the files of an adapter, and those of a directory of a data set -------------------------------------------------

ADAPTER = [
    "r", "lora_alpha", "target_modules", "peft_type", "task_type", "bias", "modules_to_save", "layers_to_transform",
    "rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_dora", "use_rslora", "fan_in_fan_out",
    "init_lora_weights", "lora_dropout", "exclude_modules", "auto_mapping", "peft_version", "revision",
    "trainable_token_indices", "layer_replication", "target_parameters", "eva_config", "corda_config", "loftq_config",
    "megatron_config", "runtime_config", "alora_invocation_tokens", "num_virtual_tokens", "token_dim", "inference_mode",
]  # fmt: skip
PEFT = [
    "LORA",
    "IA3",
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "ADALORA",
    "VERA",
    "BOFT",
    "POLY",
    "lora",
    "x",
    "OFT",
]


class Files(NamedTuple):
    """Files that take the place of those of a good directory; None: it is not there."""

    changed: Mapping[str, bytes | None]
    use: str


@cache
def good_adapter() -> Path:
    return good_model().parent / "out" / "model"


def changed_json(draw: Any, content: Mapping[str, Any], more: list[str], chosen: Mapping[str, Any]) -> bytes:
    """`content` with some keys taken out or of another value, `chosen` ones for their keys."""
    changed = dict(content)
    for key in draw(st.lists(st.sampled_from([*content, *more]), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)) == 0:
            changed.pop(key, None)
        else:
            changed[key] = draw(chosen[key] | values if key in chosen else values)
    return damaged(draw, json.dumps(changed).encode())


@st.composite
def adapter_files(draw: Any) -> Files:
    known = json.loads((good_adapter() / "adapter_config.json").read_text())
    layers = st.sampled_from(["all-linear", ["q_proj"], ["lm_head"], ["embed_tokens"], [], "x", ".*proj", "["])
    chosen = {
        "peft_type": st.sampled_from(PEFT), "target_modules": layers, "modules_to_save": layers,
        "r": st.sampled_from([0, -1, 2**40, 1, 1.5]), "layers_to_transform": st.sampled_from([0, [0], [9], -1]),
        "base_model_name_or_path": st.sampled_from(["", "model", ".", "nowhere", "/", "adapter"]),
        "task_type": st.sampled_from(["SEQ_CLS", "CAUSAL_LM", "x", "SEQ_2_SEQ_LM"]),
    }  # fmt: skip
    files: dict[str, bytes | None] = {"adapter_config.json": changed_json(draw, known, ADAPTER, chosen)}
    if draw(st.integers(0, 5)) == 0:
        tensors = (good_adapter() / "adapter_model.safetensors").read_bytes()
        files = {"adapter_model.safetensors": draw(st.sampled_from([None, damaged(draw, tensors)]))}
    return Files(files, draw(st.sampled_from(["eval", "eval", "teacher", "model"])))


def load_adapter_files(given: Files, scratch: Path) -> None:
    shutil.copytree(good_model(), scratch / "model")
    shutil.copytree(good_adapter(), scratch / "adapter")
    put(given, scratch / "adapter")
    words = {"eval": ["--model.path=adapter"], "model": ["--model.path=adapter"]}
    words["teacher"] = ["--teacher.kind=model", "--teacher.path=adapter"]
    command = "eval" if given.use == "eval" else "train"
    run_command(Command(command, words[given.use], None), scratch, to_end=given.use != "model")


@cache
def good_data(split: bool) -> Path:
    import datasets

    where = good_model().parent / f"data{split:d}"
    rows = datasets.Dataset.from_list([{"problem": f"{i}", "solution": "s", "answer": "1"} for i in range(3)])
    with redirect_stderr(io.StringIO()):
        (datasets.DatasetDict({"train": rows, "test": rows}) if split else rows).save_to_disk(str(where))
    return where


@st.composite
def data_directories(draw: Any) -> Files:
    split = draw(st.booleans())
    there = sorted(str(p.relative_to(good_data(split))) for p in good_data(split).rglob("*") if p.is_file())
    files: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(there), min_size=1, max_size=2)):
        content = (good_data(split) / name).read_bytes()
        chosen = {"splits": st.sampled_from([["train"], ["test"], ["x"], [], ["..", "train"], [1]]),
                  "_data_files": st.sampled_from([[], [{"filename": "x"}], [{"filename": "../x"}], [{}]])}  # fmt: skip
        if draw(st.integers(0, 7)) == 0:
            files[name] = None
        elif name.endswith(".json"):
            files[name] = changed_json(draw, json.loads(content), ["x", "splits", "features", "builder_name"], chosen)
        else:
            files[name] = damaged(draw, content)
    files |= draw(st.sampled_from([{}, {}, {"x": b""}, {"a.jsonl": b"{}"}, {"dataset_info.json": b"{}"}]))
    return Files(files, draw(st.sampled_from(["train", "eval"])) + "+" * split)


def read_directory(given: Files, scratch: Path) -> None:
    top = scratch / "d"
    shutil.copytree(good_data(given.use.endswith("+")), top)
    put(given, top)
    needed = ("problem", "solution") if given.use.startswith("train") else ("problem", "answer")
    with watched(scratch), redirect_stderr(io.StringIO()):
        try:
            read = read_examples(DataConfig(), prompter(False), str(top), required=needed)
        except ConfigError as error:
            check_message(str(error), (str(top), "data."))
        else:
            if not read.examples:
                raise Failure("no example, and no word of it")


def put(given: Files, directory: Path) -> None:
    for name, content in given.changed.items():
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)


# --- one input ------------------------------------------------------------------------------------------------------


def check_message(message: str, names: tuple[str, ...]) -> None:
    """One line that names something, or a title and lines about rows."""
    _, *more = message.split("\n")
    if not message or not any(name in message for name in names) or len(message) > 6000:
        raise Failure(f"a message that names nothing, or of pages: {message[:300]!r}")
    if "Traceback" in message or any(not line.startswith(("/", "train", "(", "its columns", "model")) for line in more):
        raise Failure(f"a message of several lines: {message[:600]!r}")


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """The files and directories below `directory`, with what changes when one is written."""
    paths = [path for path in directory.rglob("*") if path.suffix != ".lock"]
    return {
        str(path.relative_to(directory)): (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
    }


class _Writes:
    """What Python code of this process writes outside the directory `allowed`, which is refused."""

    allowed: Path | None = None
    installed = False
    seen: list[str] = []  # noqa: RUF012

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None or event not in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.symlink",
        ):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        for path in args[:2] if event == "os.rename" else args[:1]:
            if isinstance(path, str | bytes | os.PathLike):
                where = os.path.abspath(os.fsdecode(path))
                if not where.startswith((f"{self.allowed}", "/dev/", "/proc/")) and "__pycache__" not in where:
                    self.seen.append(f"{event} {where}")
                    raise PermissionError(13, "outside the scratch directory", where)


_writes = _Writes()


@contextmanager
def watched(scratch: Path) -> Iterator[None]:
    """In `scratch`, with a limit of time and of memory, and with no writing elsewhere."""
    here, limits = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)

    def ring(*_: Any) -> None:
        raise Hang(f"no end within {SECONDS} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 6 * SECONDS)}
    former = {number: signal.signal(number, ring) for number in timers}
    if not _writes.installed:
        sys.addaudithook(_writes)
        _writes.installed = True
    os.chdir(scratch)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    faulthandler.dump_traceback_later(8 * SECONDS, exit=True)  # for what never comes back to Python
    _writes.seen.clear()
    _writes.allowed = scratch
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    except Hang as error:
        raise Failure(str(error)) from error
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        _writes.allowed = None
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(here)
        for number, handler in former.items():
            signal.signal(number, handler)
        torch.set_num_threads(1)
    if _writes.seen:
        raise Failure(f"written outside the run directory: {_writes.seen}")


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], None], float]] = {
    "data": (data_files(), read_data, 0.4),
    "yaml": (yaml_files(), run_command, 0.25),
    "options": (command_lines(), run_command, 0.15),
    "model": (model_files(), load_model_files, 0.1),
    "adapter": (adapter_files(), load_adapter_files, 0.05),
    "directory": (data_directories(), read_directory, 0.05),
}
"""The inputs, what is done with one, and their share among all inputs."""


def fuzz(kind: str, count: int, seed: int) -> int:
    """Tries `count` inputs of `kind`, the same ones for a seed. Returns how many were run; raises what the smallest
    failing input raised, with the input in its notes."""
    strategy, check, _ = KINDS[kind]
    done = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(strategy)
    def tried(given: Any) -> None:
        nonlocal done
        done += 1
        scratch = Path(tempfile.mkdtemp(prefix="opsd-fuzz-"))
        try:
            check(given, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    tried()
    return done


def _main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--kind", choices=KINDS, help="default: all, each with its share")
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of the first {BLOCK} inputs of a kind; the next have the next"
    )
    known = parser.parse_args()
    faulthandler.enable()  # a library that ends the process does so with its place; the seed is the one after the last
    failures = 0
    for kind, (_, _, share) in KINDS.items():
        if known.kind not in (None, kind):
            continue
        count, done, began = math.ceil(known.inputs * (1 if known.kind else share)), 0, time.perf_counter()
        for seed in range(known.seed, known.seed + math.ceil(count / BLOCK)):
            size = min(BLOCK, count - (seed - known.seed) * BLOCK)
            try:
                done += fuzz(kind, size, seed)
            except Exception as error:
                failures += 1
                traceback.print_exception(error, limit=-6)
                print(*getattr(error, "__notes__", ()), sep="\n")
                print(f"again: python tests/opsd/fuzz.py --kind {kind} --seed {seed} --inputs {size}", flush=True)
            seconds = time.perf_counter() - began
            print(f"{kind}: seed {seed}, {done} of {count} inputs, {failures} failures, {seconds:.0f} s", flush=True)
    return min(1, failures)


if __name__ == "__main__":
    sys.exit(_main())
