import pytest

from opsd.cli import main, parse_overrides
from opsd.config import load_config, to_yaml, unused_options
from opsd.errors import ConfigError

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


def test_a_bad_value_is_named_even_where_another_hides_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optim: {steps: 0}\n")
    with pytest.raises(ConfigError, match=r"optim.steps is 0; accepted: int >= 1"):
        load(("optim.steps", "9"), yaml=path)
    path.write_text("objective: {tail_bucket: true}\n")  # what does not go together is another matter
    assert load(("objective.top_k", "9"), yaml=path).objective.tail_bucket


def test_learning_rate_follows_the_kind_of_training():
    assert load().optim.lr == 1e-6
    assert load(("lora.enabled", "true")).optim.lr == 5e-6
    assert load(("lora.enabled", "true"), ("optim.lr", "1e-3")).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("optim.learning-rate", "1", ["unknown option 'optim.learning-rate'; did you mean optim.lr?"]),
        ("lora.rank", "1", ["did you mean lora.r?"]),
        ("optim.xyz", "1", ["'optim.xyz'; known in optim: optim.lr, optim.betas, ", "optim.batch-size", "norm"]),
        ("learning_rate", "1", ["did you mean optim.lr?"]),
        ("epochs", "1", ["options are spelt section.option; the sections: model, lora,"]),
        ("optim.temprature", "1", ["optim.temprature", "did you mean"]),
        ("optim.temperature", "1", ["rollout.temperature", "objective.temperature"]),
        ("optim.step", "1", ["optim.steps"]),
        ("optim.steps", "0", ["optim.steps", "'0'", ">= 1"]),
        ("optim.steps", "1.5", ["optim.steps", "1.5", "int"]),
        ("optim.lr", "fast", ["optim.lr", "fast", "float", "> 0"]),
        ("optim.lr", "nan", ["optim.lr", "nan"]),
        ("optim.betas", "0.9", ["optim.betas", "float,float"]),
        ("optim.betas", [True, 0.9], ["optim.betas is [True, 0.9]", "float,float"]),
        ("optim.betas", True, ["optim.betas is True", "float,float"]),
        ("lora.r", True, ["lora.r is True", "int >= 1"]),
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
        ("eval.top_p", "0.9", ["eval.top_p is 0.9", "eval.temperature 0", "accepted then: 1"]),
        ("eval.top_k", "5", ["eval.top_k is 5", "eval.temperature 0", "accepted then: 0"]),
        ("eval.min_p", "0.1", ["eval.min_p is 0.1", "eval.temperature 0", "accepted then: 0"]),
        ("eval.every", "3", ["eval.every is 3", "data.eval"]),
        ("eval.keep_best", "true", ["eval.keep_best is true without eval.every: set eval.every"]),
        ("eval.patience", "2", ["eval.patience is 2 without eval.every: set eval.every"]),
        ("teacher.kind", "model", ["teacher.kind model needs teacher.path"]),
        ("teacher.path", "m", ["teacher.path is 'm' with teacher.kind base", "set teacher.kind model"]),
        ("prompts.student_chat_args", {"x": object()}, ["prompts.student_chat_args", "text"]),
        ("data.columns", {"problem": 5}, ["data.columns", "{'problem': 5}", "text"]),
    ],
)
def test_errors_name_option_value_and_what_is_accepted(name, value, parts):
    with pytest.raises(ConfigError) as caught:
        load((name, value))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_an_unknown_option_is_answered_with_its_own_section():
    with pytest.raises(ConfigError) as caught:
        load(("optim.xyz", "1"))
    assert "_" not in str(caught.value)
    assert "rollout" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim:\n  steps: 5\n  lr: 1\n  steps: 6\n", ["'steps' stands twice", "line 4"]),
        ("optim: {steps: 5}\neval: {samples: 1}\noptim: {lr: 1}\n", ["'optim' stands twice", "line 3"]),
        ("optim: {batch-size: 5, batch_size: 6}\n", ["section optim", "batch-size and batch_size"]),
    ],
)
def test_what_stands_twice_is_named(tmp_path, text, parts):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(yaml=path)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_anchors_may_be_merged_and_overridden(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("rollout: &cuts {top_p: 0.9, top_k: 5}\neval: {<<: *cuts, top_k: 6, temperature: 1}\n")
    config = load(yaml=path)
    assert (config.eval.top_p, config.eval.top_k, config.rollout.top_k) == (0.9, 6, 5)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"preset": ["x"]}, r"preset is \['x'\]; accepted: tiny, paper"),
        ({"preset": []}, r"preset is \[\]; accepted: tiny"),
        (5, r"config is 5; accepted: the path of a YAML file, or a mapping"),
        ([("optim.steps", 1)], r"config is \[.*accepted: the path"),
    ],
)
def test_a_source_of_another_kind_is_refused(source, said):
    with pytest.raises(ConfigError, match=said):
        load_config(source, OWN)


def test_paths_and_mappings_are_taken_for_their_text(tmp_path):
    given = {
        "model": {"path": tmp_path / "m"},
        "data": {"train": tmp_path / "t", "columns": {"problem": "question", "solution": "a,b=c"}},
        "prompts": {"student_chat_args": {"enable_thinking": False}, "teacher_chat_args": {}},
    }
    config = load_config(given)
    assert (config.model.path, config.data.train) == (str(tmp_path / "m"), str(tmp_path / "t"))
    assert config.data.columns == ("problem=question", "solution=a,b=c")
    assert config.prompts.student_chat_args == '{"enable_thinking": false}'
    assert config.prompts.teacher_chat_args == "{}"
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    path.write_text("data: {columns: {problem: q}}\nprompts: {student_chat_args: {enable_thinking: false}}\n")
    assert load(yaml=path).prompts.student_chat_args == '{"enable_thinking": false}'
    assert load(yaml=path).data.columns == ("problem=q",)


def test_evaluations_during_training_need_data_unless_those_are_embedded():
    with pytest.raises(ConfigError, match=r"eval.every is 3 without data.eval"):
        load(("eval.every", "3"), ("eval.keep_best", "true"))
    assert load_config(None, [("eval.every", "3"), ("eval.patience", "2")]).eval.patience == 2
    assert load(("eval.every", "3"), ("data.eval", "e")).eval.every == 3


def test_a_presets_settings_are_not_the_users(tmp_path):
    config = load_config(None, [*OWN, ("lora.enabled", "false")], "paper")
    assert config.optim.lr == 1e-6
    assert load_config(None, OWN, "paper").optim.lr == 5e-6
    assert unused_options(config) == []
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    assert unused_options(load_config(path)) == []
    told = unused_options(load_config(path, [("lora.target_modules", "q_proj"), ("lora.dropout", "0.1")]))
    assert [line.split()[0] for line in told] == ["lora.dropout", "lora.target_modules"]


@pytest.mark.parametrize("preset", ["paper", "sdft", "sdpo", None])
@pytest.mark.parametrize("named", [[], ["--model.path=m"], ["--data.train=t"], ["--model.path=m", "--eval.every=3"]])
def test_printing_needs_no_model(tmp_path, capsys, preset, named):
    words = ["train", "--print-config", *named, *([f"--preset={preset}"] if preset else [])]
    assert main(words) == 0
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    own = [*OWN, ("data.eval", "e")]
    given = [tuple(word.removeprefix("--").split("=")) for word in named]
    if preset or named:  # what is filled in later makes it what it had been with it
        assert load_config(path, own) == load_config(None, [*given, *own], preset)
    if preset:
        with pytest.raises(ConfigError, match=r"needs a model.path|without data.train|without model.path"):
            load_config(path)


def test_printing_the_embedded_set_up_with_other_data_is_refused(capsys):
    assert main(["train", "--print-config", "--preset=tiny", "--data.train=t"]) == 2
    assert "data.train is given without model.path" in capsys.readouterr().err


def test_what_belongs_to_something_off_is_told(tmp_path):
    options = {
        "lora.r": 4,
        "teacher.ema_decay": 0.5,
        "teacher.reason_max_new_tokens": 9,
        "objective.top_k_from": "student",
        "eval.samples": 2,
        "eval.temperature": 1,
    }
    on = {
        "lora.enabled": True,
        "teacher.kind": "ema",
        "teacher.reason_first": True,
        "objective.top_k": 5,
        "data.eval": "e",
    }
    told = unused_options(load(*options.items()))
    assert told[0] == "lora.r is 4, which changes nothing, since lora.enabled is false"
    assert [line.split()[0] for line in told] == list(options)
    assert unused_options(load(*options.items(), *on.items())) == []
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(load()))
    assert unused_options(load_config(path)) == []
    assert unused_options(load_config()) == []
    sampled = load(("objective.form", "sampled_token"), ("objective.beta", "1"))
    assert unused_options(sampled) == [
        "objective.beta is 1.0, which changes nothing, since objective.form is sampled_token"
    ]


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
