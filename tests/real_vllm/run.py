"""The vLLM engine with a real vLLM, in an environment that has one: `make test-vllm`.

A script, as vLLM starts processes that import what started it. Anything wrong ends it with an AssertionError.
"""

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
        engine = VllmEngine.of(run.config, plain, rows=16, longest=128)
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
    none = [*range(20, 40), *range(60, student.config.vocab_size)]  # ids without a token
    gapped = replace(plain, holes=tuple(range(20, 40)), vocabulary=60)
    assert gapped.barred(student.config.vocab_size) == none
    greedy = Sampling(24, temperature=0.0)
    barred = replace(engine, engine=gapped)
    assert [r.ids for r in barred.sample(prompts, greedy, range(6))] == [
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
    print("all passed")


if __name__ == "__main__":
    main()
