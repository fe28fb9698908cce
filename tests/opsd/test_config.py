import pytest

from opsd.cli import parse_overrides
from opsd.config import ConfigError, load_config, to_yaml

OWN = [("model.path", "m"), ("data.train", "t.jsonl")]


def load(*overrides, yaml=None):
    return load_config(yaml, [*OWN, *overrides])


def test_yaml_below_overrides_and_round_trip(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "optim: {lr: 1e-4, steps: 7, betas: [0.9, 0.95]}\nprompts: {chat: off}\nobjective: {entry_clip: 0.05}\n"
    )
    config = load(("optim.steps", "9"), ("objective.entry-clip", "none"), yaml=path)
    assert (config.optim.lr, config.optim.steps, config.optim.betas) == (1e-4, 9, (0.9, 0.95))
    assert config.prompts.chat == "off"
    assert config.objective.entry_clip is None
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_learning_rate_follows_the_kind_of_training():
    assert load().optim.lr == 1e-6
    assert load(("lora.enabled", "true")).optim.lr == 5e-6
    assert load(("lora.enabled", "true"), ("optim.lr", "1e-3")).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("optim.learnrate", "1", ["optim.learnrate", "known"]),
        ("optim.temprature", "1", ["optim.temprature", "did you mean"]),
        ("optim.temperature", "1", ["rollout.temperature", "objective.temperature"]),
        ("optim.step", "1", ["optim.steps"]),
        ("optim.steps", "0", ["optim.steps", "'0'", ">= 1"]),
        ("optim.steps", "1.5", ["optim.steps", "1.5", "int"]),
        ("optim.lr", "fast", ["optim.lr", "fast", "float", "> 0"]),
        ("optim.lr", "nan", ["optim.lr", "nan"]),
        ("optim.betas", "0.9", ["optim.betas", "float,float"]),
        ("objective.beta", "1.1", ["objective.beta", "1.1", ">= 0 and <= 1"]),
        ("teacher.kind", "emma", ["teacher.kind", "ema", "base|live"]),
        ("lora.enabled", "maybe", ["lora.enabled", "true|false"]),
        ("objective.tail_bucket", "true", ["top_k"]),
        ("prompts.teacher", "{problem} only", ["prompts.teacher", "{solution}"]),
        ("prompts.student", "nothing", ["prompts.student", "{problem}"]),
        ("prompts.student", "{problem} {solution}", ["prompts.student", "teacher"]),
        ("eval.answer_pattern", "a", ["eval.answer_pattern", "0 groups"]),
        ("eval.answer_pattern", "(", ["eval.answer_pattern"]),
        ("eval.samples", "4", ["eval.temperature"]),
    ],
)
def test_errors_name_option_value_and_what_is_accepted(name, value, parts):
    with pytest.raises(ConfigError) as caught:
        load((name, value))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_clips_are_refused_where_they_would_be_ignored():
    with pytest.raises(ConfigError, match=r"entry_clip"):
        load(("objective.form", "sampled_token"), ("objective.entry_clip", "0.05"))


def test_model_and_data_come_together():
    with pytest.raises(ConfigError, match=r"model.path is given without data.train"):
        load_config(None, [("model.path", "m")])
    with pytest.raises(ConfigError, match=r"data.train is given without model.path"):
        load_config(None, [("data.train", "t")])


def test_unusable_yaml_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {lr: 1}")
    with pytest.raises(ConfigError, match=r"unknown section 'optimizer'; did you mean optim"):
        load(yaml=path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"cannot be read as YAML"):
        load(yaml=path)


def test_command_line_spellings():
    words = ["--optim.batch-size", "4", "--optim.batch_size=5", "--lora.enabled", "--eval.answer-pattern=--(x)"]
    assert parse_overrides([*words, "--data.skip-bad-rows", "false"]) == [
        ("optim.batch-size", "4"),
        ("optim.batch_size", "5"),
        ("lora.enabled", "true"),
        ("eval.answer-pattern", "--(x)"),
        ("data.skip-bad-rows", "false"),
    ]
    for words in (["--optim.lr"], ["--optim.lr", "--lora.enabled"], ["stray"], ["--nothing", "1"]):
        with pytest.raises(ConfigError):
            parse_overrides(words)
