"""`opsd check`: what it says is right, its errors are those of `opsd train`, and nothing is trained or written."""

import json
from dataclasses import replace

import pytest
import torch
from _models import VOCAB, model, tokenizer, write_model, write_rows
from safetensors.torch import load_file, save_file

from benchmarks.measure import peak_bytes
from opsd.cli import main, parse_overrides
from opsd.config import load_config
from opsd.memory import memory_of
from opsd.models import autocast
from opsd.optim import make_optimizer
from opsd.plugins import Parts
from opsd.rollouts import Rollout
from opsd.scoring import score
from opsd.setup import set_up
from opsd.step import micro_batches

NEW = 12


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Options of a run, by name. The working directory is `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", chat=True)
    write_rows(tmp_path / "train.jsonl", 12)
    return {
        "model.path": "model",
        "data.train": "train.jsonl",
        "rollout.max_new_tokens": NEW,
        "optim.steps": 1,
        "optim.batch_size": 4,
        "run.device": "cpu",
    }


def words(options):
    return [f"--{name}={value}" for name, value in options.items()]


def contents(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def checked(options, capsys):
    """What `opsd check` says of options that are right."""
    capsys.readouterr()
    assert main(["check", *words(options)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def never(*_, **__):
    raise AssertionError("something is trained")


@pytest.mark.parametrize("options", [{}, {"run.dir": "out"}])
def test_a_run_is_described_and_nothing_is_done(given, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(torch.Tensor, "backward", never)
    monkeypatch.setattr(torch.optim.AdamW, "step", never)
    before = contents(tmp_path)
    said = checked(given | options, capsys)
    assert contents(tmp_path) == before
    total = sum(p.numel() for p in model().parameters())
    assert f"parameters: {total:,}, of which {total:,} are trained" in said
    assert "model: LlamaForCausalLM of " in said
    assert "cpu, float32, head tied to the embedding" in said
    assert "with a chat template; pad 0 '<pad>', end 1 '<end>', beginning none" in said
    assert f"vocabulary: {VOCAB} tokens; embedding of {VOCAB} rows, head of {VOCAB}, none masked" in said
    assert "scoring: packed rows" in said
    assert "attention sdpa" in said
    assert "data.train: 12 rows, 0 skipped, 0 too long; columns 'problem', 'solution', 'answer'\n" in said


def test_both_prompts_are_shown_and_their_lengths_counted(given, tmp_path, capsys):
    rows = [{"question": "1+1" + "?" * more, "solution": "2", "level": 3} for more in (0, 4, 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data.columns": "problem=question", "prompts.student": "{problem}!"}
    options |= {"prompts.teacher": "{problem} is {solution}"}
    said = checked(given | options, capsys)
    student, teacher = (f"[user]{text}[assistant]" for text in ("1+1!", "1+1 is 2"))  # a token is a character
    for name, text in (("student", student), ("teacher", teacher)):
        assert f"--- first {name} prompt, {len(text)} tokens ---\n{text}\n" in said
        spread = f"min {len(text)}, median {len(text) + 4}, max {len(text) + 5} tokens"
        assert f"  {name}'s prompts: {spread} (data.max_prompt_tokens 4096)" in said
    assert "columns 'question' (problem), 'solution'\n" in said


def test_what_lora_matches_is_counted(given, capsys):
    options = {"lora.enabled": True, "lora.r": 4, "lora.target_modules": "q_proj,down_proj"}
    said = checked(given | options, capsys)
    # of two layers: 32 to 4 heads of 8, and 48 to 32
    trained = 2 * 4 * ((32 + 32) + (48 + 32))
    assert "LoRA: 4 modules (q_proj 2, down_proj 2), r 4" in said
    assert f"of which {trained:,} are trained" in said


def test_masked_ids_a_padded_model_and_rows_left_out_are_named(given, tmp_path, capsys):
    model(vocab_size=VOCAB + 7, tie_word_embeddings=False).save_pretrained(tmp_path / "wide")
    tokenizer().save_pretrained(tmp_path / "wide")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"problem": "1"}) + "\n" + json.dumps({"problem": "1" * 300, "solution": "1"}) + "\n")
    options = {"model.path": "wide", "model.packing": "off", "data.skip_bad_rows": True, "data.too_long": "drop"}
    said = checked(given | options | {"data.max_prompt_tokens": 300}, capsys)
    assert f"head of {VOCAB + 7}, ids {VOCAB} to {VOCAB + 6} are no tokens and masked" in said
    assert "head of its own weights" in said
    assert "scoring: padded, as asked; attention sdpa" in said
    assert "data.train: 12 rows, 1 skipped, 1 too long" in said
    assert "warning: 1 rows of data.train are too long and dropped:" in said


def spoil(file):
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


def bad_row(directory):
    (directory / "train.jsonl").write_text('{"problem": "1"}\n')
    return {}


def bad_weights(directory):
    spoil(directory / "model" / "model.safetensors")
    return {}


def no_tokenizer(directory):
    (directory / "model" / "tokenizer.json").write_text("{")
    return {}


def bad_eval(directory):
    (directory / "eval.jsonl").write_text('{"problem": "1"}\n')
    return {"data.eval": "eval.jsonl"}


def used_directory(directory):
    (directory / "out").mkdir()
    (directory / "out" / "mine").touch()
    return {"run.dir": "out"}


def option(**options):
    return lambda directory: {name.replace("__", "."): value for name, value in options.items()}


FAULTS = {
    "used_directory": used_directory,
    "recipe": option(objective__recipe="cepo"),
    "scorer": option(eval__scorer="none_such:f"),
    "no_tokenizer": no_tokenizer,
    "chat_args": option(prompts__student_chat_args='{"tools": 1, "x": 2}'),
    "bad_row": bad_row,
    "no_file": option(data__train="none.jsonl"),
    "no_column": option(data__columns="problem=question"),
    "too_long": option(data__max_prompt_tokens=20),
    "bad_eval": bad_eval,
    "no_model": option(model__path="./none"),
    "bad_weights": bad_weights,
    "no_layer": option(lora__enabled=True, lora__target_modules="c_attn"),
    "positions": option(rollout__max_new_tokens=4000),
    "teacher": option(teacher__kind="model", teacher__path="./none"),
    "option": option(optim__batch_size=0),
}
"""What is wrong, in the order in which a run finds it; the last one before anything else."""


def errors(command, options, capsys):
    capsys.readouterr()
    assert main([command, *words(options)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_as_train_says_it(given, tmp_path, capsys, fault):
    options = given | FAULTS[fault](tmp_path)
    before = contents(tmp_path)
    said = errors("check", options, capsys)
    assert contents(tmp_path) == before
    assert said == errors("train", options, capsys)
    assert said.count("opsd: ") == 1


@pytest.mark.parametrize("faults", [
    ("bad_row", "bad_weights"),
    ("no_tokenizer", "bad_weights"),
    ("no_tokenizer", "bad_row", "bad_weights"),
    ("recipe", "scorer", "bad_row", "bad_eval", "bad_weights"),
    ("used_directory", "too_long", "teacher"),
])  # fmt: skip
def test_faults_that_have_nothing_to_do_with_each_other_are_all_named(given, tmp_path, capsys, faults):
    alone = []
    for fault in faults:
        kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        alone.append(errors("train", given | FAULTS[fault](tmp_path), capsys))
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            path.write_bytes(kept[path]) if path in kept else path.unlink()
        if (tmp_path / "out").exists():
            (tmp_path / "out").rmdir()
    options = given
    for fault in faults:
        options = options | FAULTS[fault](tmp_path)
    assert errors("check", options, capsys) == "".join(alone)
    assert errors("train", options, capsys) == alone[0]


def test_what_can_be_said_beside_an_error_is_said(given, tmp_path, capsys):
    bad_weights(tmp_path)
    assert main(["check", *words(given)]) == 2
    said = capsys.readouterr().out
    assert "--- first teacher prompt, " in said
    assert "data.train: 12 rows" in said
    assert "memory" not in said


@pytest.mark.parametrize("argv", [[], ["--preset", "tiny"], ["--resume", "out"]])
def test_there_is_nothing_to_check_without_a_model_of_ones_own(argv, capsys):
    assert main(["check", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def setup_of(given, **options):
    overrides = given | {name.replace("__", "."): value for name, value in options.items()}
    return set_up(load_config(None, parse_overrides(words(overrides))), Parts())


def largest_micro_batch(setup):
    """Rollouts as long as they may be, after prompts as long as the longest, which differ: equal ones are shared."""
    run, each = setup.run, setup.run.config.rollout.per_prompt
    longest = max(setup.examples, key=lambda example: len(example.student))
    count = run.config.optim.micro_batch_size
    rollouts = [Rollout([5 + i] * run.config.rollout.max_new_tokens, True) for i in range(count)]
    examples = [replace(longest, student=[*longest.student[:-1], 9 + i]) for i in range(count // each)]
    batch = next(micro_batches(run, examples, rollouts))
    assert len(batch.rollouts) == count
    run.model.train()
    return batch


@pytest.mark.parametrize("options", [
    {},
    {"rollout__per_prompt": 2},
    {"model__packing": "off"},
    {"lora__enabled": True, "model__packing": "off"},
])  # fmt: skip
def test_activations_are_those_of_the_largest_micro_batch(given, options):
    setup = setup_of(given, rollout__max_new_tokens=200, **options)
    estimate, batch, held = memory_of(setup).activations, largest_micro_batch(setup), {}
    parameters = {p.untyped_storage().data_ptr() for p in setup.run.model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student, teachers = score(setup.run, batch)
        setup.run.recipe.loss(student, teachers, batch, len(batch.target_ids))
    for stream in (student, *teachers.values()):
        pack(stream.hidden)
    saved = sum(size for size, _ in held.values())
    assert saved * 0.99 <= estimate <= saved * 1.03  # tables of positions are shared by rollouts


@pytest.mark.parametrize("options", [
    {},
    {"model__gradient_checkpointing": True},
    {"model__packing": "off", "model__gradient_checkpointing": True},
    {"lora__enabled": True, "teacher__kind": "base", "model__gradient_checkpointing": True},
    {"model__autocast": "bfloat16"},
])  # fmt: skip
def test_the_estimate_bounds_what_a_step_allocates(given, tmp_path, options):
    sizes = {"vocab_size": 4000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}
    model(**sizes).save_pretrained(tmp_path / "model")
    options = {"teacher__kind": "live", "objective__workspace_bytes": 4 << 20, "optim__micro_batch_size": 2} | options
    setup = setup_of(given, rollout__max_new_tokens=300, **options)
    run, batch, memory = setup.run, largest_micro_batch(setup), memory_of(setup)

    def step():
        student, teachers = score(run, batch)
        with autocast(run.config.model, run.device):
            loss, _ = run.recipe.loss(student, teachers, batch, len(batch.target_ids))
        loss.backward()

    allocated = peak_bytes(step, run.device)
    assert allocated <= memory.gradients + memory.activations + memory.workspace <= 1.6 * allocated


def test_what_is_not_tried_is_exact_and_checkpointing_needs_less(given, tmp_path):
    write_rows(tmp_path / "eval.jsonl", 3)
    setup = setup_of(given, teacher__kind="live", rollout__batch_size=3)
    memory = memory_of(setup)
    parameters = sum(p.numel() * 4 for p in setup.run.model.parameters())
    buffers = sum(b.numel() * b.itemsize for b in setup.run.model.buffers())
    assert (memory.weights, memory.gradients) == (parameters + buffers, parameters)
    optimizer = make_optimizer(setup.run.model, setup.run.config.optim)
    for p in setup.run.model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = [t for one in optimizer.state.values() for t in one.values() if t.ndim]
    assert memory.optimizer == sum(t.nbytes for t in state)
    longest = max(len(example.student) for example in setup.examples)
    of_a_token = 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers, 2 heads of 8 numbers of 4 bytes
    assert memory.cache == 3 * (longest + NEW) * of_a_token
    assert memory.workspace == 384 << 20
    assert memory.peak == memory.weights + memory.optimizer + memory.gradients + memory.activations + memory.workspace

    assert memory_of(setup_of(given, teacher__kind="base")).weights == 2 * memory.weights
    for changes in ({}, {"rollout__importance_cap": 2}, {"objective__recipe": "opsd"}):
        assert memory_of(setup_of(given, objective__workspace_bytes=10**6, **changes)).workspace == 10**6
    evaluated = memory_of(setup_of(given, data__eval="eval.jsonl", eval__max_new_tokens=1000, eval__batch_size=2))
    shorter = longest - 2  # its problems are of one digit twice
    assert evaluated.cache == 2 * (shorter + 1000) * of_a_token
    checkpointed = memory_of(setup_of(given, teacher__kind="live", model__gradient_checkpointing=True))
    assert checkpointed.activations < memory.activations
