"""The vLLM engine with a real vLLM, in an environment that has one: `make test-vllm`.

A script, as vLLM starts processes that import what started it. Anything wrong ends it with an AssertionError.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "opsd"))


def main() -> None:
    import pytest
    import torch
    from _models import examples, lora, model, run_of, tokenizer

    from opsd.engines import GenerateEngine
    from opsd.engines.vllm import VllmEngine
    from opsd.options import ModelConfig
    from opsd.rollouts import Sampling

    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13]] * 2
    plain = GenerateEngine([1], 0, ModelConfig())
    student = model(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    with tempfile.TemporaryDirectory() as directory:
        student.save_pretrained(directory)
        tokenizer().save_pretrained(directory)
        run = run_of(student, model__path=directory)
        state = torch.get_rng_state()
        engine = VllmEngine.of(run.config, plain, student, longest=128)
        assert torch.equal(torch.get_rng_state(), state)

    def same_as(trained, what):
        greedy = Sampling(24, temperature=0.0)
        expected = [r.ids for r in plain.write(trained, prompts, greedy, range(6), 6)]
        engine.load(trained)
        assert [r.ids for r in engine.sample(prompts, greedy, range(6))] == expected, what
        cut = Sampling(24, temperature=0.8, top_p=0.9)
        sampled = engine.sample(prompts, cut, range(6))
        assert [r.ids for r in engine.sample(prompts[3:], cut, range(3, 6))] == [r.ids for r in sampled[3:]], what
        worst = 0.0
        for prompt, r in zip(prompts, sampled, strict=True):
            logits = trained.eval()(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1]
            p, order = (logits.double() / 0.8).softmax(-1).sort(-1, descending=True)
            p = p * (p.cumsum(-1) - p < 0.9)
            p = torch.zeros_like(p).scatter(1, order, p / p.sum(-1, keepdim=True))
            known = p.gather(1, torch.tensor(r.ids)[:, None])[:, 0].log()
            worst = max(worst, (known - torch.tensor(r.logprobs)).abs().max().item())
        assert worst < 1e-4, (what, worst)
        print(f"{what}: greedy tokens equal, log-probabilities within {worst:.1e}", flush=True)
        return expected

    with torch.no_grad():
        before = same_as(student, "first weights")
        for step in (1, 2):  # an optimiser's steps
            for parameter in student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            after = same_as(student, f"after step {step}")
            assert after != before
            before = after
        adapted = lora(student)
        assert same_as(adapted, "with LoRA") != before
        with adapted.disable_adapter():  # the teacher
            greedy = Sampling(24, temperature=0.0)
            assert [r.ids for r in engine.write(adapted, prompts, greedy, range(6), 6)] == before
    none = [*range(20, 40), *range(60, student.config.vocab_size)]  # ids without a token
    gapped = replace(plain, holes=tuple(range(20, 40)), vocabulary=60)
    assert gapped.barred(student.config.vocab_size) == none
    greedy = Sampling(24, temperature=0.0)
    barred = replace(engine, engine=gapped)
    assert [r.ids for r in barred.write(adapted, prompts, greedy, range(6), 6)] == [
        r.ids for r in gapped.write(adapted, prompts, greedy, range(6), 6)
    ]
    for prompt, r in zip(prompts, barred.sample(prompts, Sampling(24), range(6)), strict=True):
        logits = adapted(torch.tensor([prompt + r.ids])).logits[0, len(prompt) - 1 : -1].double()
        known = logits.index_fill(1, torch.tensor(none), -torch.inf).log_softmax(-1)
        assert (known.gather(1, torch.tensor(r.ids)[:, None])[:, 0] - torch.tensor(r.logprobs)).abs().max() < 1e-4
    print("ids without a token are never written", flush=True)
    run = replace(run, model=student, engine=engine)
    assert len(engine.rollouts(run, examples(), 1)) == len(examples())
    student.config.tie_word_embeddings = False
    bare = torch.nn.Parameter(torch.zeros(1))
    engine.llm.apply_model(lambda served: served.register_parameter("never_given", bare))
    with pytest.raises(RuntimeError, match="never_given"):
        engine.load(student)
    for options in ({}, {"lora.enabled": "true", "lora.r": "4"}):
        several_processes(options)
    print("all passed")


def several_processes(options: dict[str, str]) -> None:
    """Two of them, each with a vLLM, take the steps of one; without adapters they divide the weights."""
    from _models import model, tokenizer, write_rows

    with tempfile.TemporaryDirectory() as folder:
        directory, found = Path(folder), []
        model(num_attention_heads=2, num_key_value_heads=1, head_dim=32).save_pretrained(directory / "m")
        tokenizer().save_pretrained(directory / "m")
        options = options | {
            "model.path": directory / "m",
            "data.train": write_rows(directory / "train.jsonl", 5),
            "data.eval": write_rows(directory / "eval.jsonl", 3),
            "eval.scorer": "exact",
            "rollout.engine": "vllm",
            "rollout.max_new_tokens": 8,
            "rollout.per_prompt": 3,
            "optim.steps": 3,
            "optim.batch_size": 3,
            "optim.lr": 1e-3,
            "optim.warmup_steps": 0,
            "run.device": "cpu",
            "run.sample_every": 1,
        }
        for count in (1, 2):
            words = [*(f"--{name}={value}" for name, value in options.items()), f"--run.dir={directory / str(count)}"]
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            ran = subprocess.run(
                [sys.executable, *launcher, "-m", "opsd", "train", *words], capture_output=True, text=True
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            assert "Traceback" not in ran.stderr, ran.stderr
            divided = count > 1 and "lora.enabled" not in options
            assert ("weights: divided among 2 processes" in ran.stdout) == divided, ran.stdout
            files = [
                (directory / str(count) / f"{name}.jsonl").read_text() for name in ("metrics", "samples", "evaluations")
            ]
            metrics, samples, answers = ([json.loads(line) for line in text.splitlines()] for text in files)
            written = [[one["rollout"] for one in samples], answers]
            found.append(([one["loss"] for one in metrics], written))
        (losses, texts), (others, again) = found
        assert texts == again, (texts, again)
        assert all(abs(a - b) < 1e-4 * a for a, b in zip(losses, others, strict=True)), (losses, others)
        assert len(set(texts[0])) > 3
        print(f"two processes, {'adapters' if 'lora.enabled' in options else 'weights divided'}: as one", flush=True)


if __name__ == "__main__":
    main()
