"""The README's longer examples, run as they stand there on a tiny model."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from _models import model, tokenizer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def example(name):
    """The code below the mark of that name."""
    (code,) = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    return code


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with what the examples name, CPU alone."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("REPORT_TO", "none")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model("qwen3").save_pretrained("path/to/model")
    words = tokenizer()
    words.padding_side = "left"
    words.save_pretrained("path/to/model")
    rows = [{"prompt": f"{i} plus {7 * i}?", "privileged_context": f"it is {8 * i}"} for i in range(12)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(trained):
    return {name: p.detach().clone() for name, p in trained.named_parameters()}


def test_the_example_of_trl(here):
    pytest.importorskip("trl", minversion="1.16", exc_type=ImportError)
    code, scope = example("trl"), {}
    assert code.count("\n") < 40
    code = code.replace('output_dir="out",', 'output_dir="out", use_cpu=True,')  # TRL's defaults are for a GPU
    logging.disable(logging.WARNING)
    try:
        exec(code, scope)
    finally:
        logging.disable(logging.NOTSET)
    before, after = weights(model("qwen3")), weights(scope["trainer"].model)
    assert max((before[name] - after[name]).abs().max() for name in before) > 1e-7
    assert scope["trainer"].state.global_step == 2


def test_the_example_of_transformers(here):
    code, scope = example("transformers"), {}
    assert code.count("\n") < 40
    exec(code, scope)
    trainer = scope["OPSDTrainer"]
    assert Path("out").exists()

    # The loss of one batch, beside dense logits over padded rows.
    student = model("qwen3").train()
    built = trainer(student, scope["TrainingArguments"]("out", use_cpu=True), processing_class=scope["words"])
    rows = scope["rows"].select(range(3))
    inputs = {name: [row[name] for row in rows] for name in ("student", "teacher")}
    torch.manual_seed(0)
    whole = built.write(student, inputs["student"])
    end = whole[0][7]
    scope["words"].eos_token_id = end
    torch.manual_seed(0)
    rollouts = built.write(student, inputs["student"])
    assert rollouts == [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert len(rollouts[0]) <= 8
    torch.manual_seed(0)
    loss = built.compute_loss(student, inputs)
    total, count = 0.0, 0
    for own, taught, ids in zip(inputs["student"], inputs["teacher"], rollouts, strict=True):
        p, q = (
            student(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for prompt in (own, taught)
        )
        m = torch.logaddexp(p, q) - torch.tensor(2.0).log()
        total += 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum().detach()
        count += len(ids)
    assert loss.detach() == pytest.approx(float(total / count), rel=1e-5)
