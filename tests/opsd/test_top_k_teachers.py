"""Teachers that are no models here: cached in files, and on a server. Both beside the same teacher as a model."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from _models import VOCAB, model, tokenizer, write_model, write_rows
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opsd
from opsd import served_teacher
from opsd.cache_command import cache_teacher
from opsd.cli import main
from opsd.config import load_config
from opsd.errors import ConfigError, RunError
from opsd.teacher_cache import TeacherCache


@pytest.fixture
def options(tmp_path):
    write_model(tmp_path / "base", "qwen3")
    model("llama", seed=7).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    found = {
        "model.path": tmp_path / "base",
        "data.train": write_rows(tmp_path / "train.jsonl"),
        "teacher.kind": "model",
        "teacher.path": tmp_path / "teacher",
        "optim.steps": 2,
        "optim.batch_size": 3,
        "optim.micro_batch_size": 2,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "rollout.max_new_tokens": 8,
        "rollout.per_prompt": 2,
        "objective.top_k": VOCAB,
        "run.device": "cpu",
        "run.checkpoint_every": 1,
    }
    return {name: str(value) for name, value in found.items()}


def cached(options, tmp_path, **changes):
    """A cache by these options, and the options that train from it."""
    config = load_config(None, (options | changes).items())
    made = cache_teacher(config, tmp_path / "cache", quiet=True)
    return made, options | changes | {"teacher.kind": "cached", "teacher.path": str(made)}


def trained(options, tmp_path, name, **parts):
    result = opsd.train(load_config(None, [*options.items(), ("run.dir", str(tmp_path / name))]), quiet=True, **parts)
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return dict(AutoModelForCausalLM.from_pretrained(result.model_dir).named_parameters()), records


def check_same(ours, theirs):
    (weights, records), (expected, wanted) = ours, theirs
    for record, want in zip(records, wanted, strict=True):
        assert record["loss"] > 1e-2
        for name in ("loss", "grad_norm", "student_entropy", "tokens"):
            assert record[name] == pytest.approx(want[name], rel=1e-4), name
    start = dict(model("qwen3").named_parameters())
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3
    for name, value in expected.items():
        assert (weights[name] - value).abs().median() < 1e-6, name


@pytest.mark.parametrize("packing", ["on", "off"])
def test_training_from_a_cache_is_that_beside_the_teacher(options, tmp_path, packing):
    """With all of the vocabulary in it, and on the same rollouts."""
    options["model.packing"] = packing
    made, own = cached(options, tmp_path)
    cache = TeacherCache(made)
    shutil.rmtree(tmp_path / "teacher")  # nobody needs it
    shown = trained(own, tmp_path, "cached")
    model("llama", seed=7).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")

    def same(run, examples, number):
        return [rollout for example in examples for rollout in cache.rollouts(example)]

    check_same(shown, trained(options | {"objective.top_k": "none"}, tmp_path, "model", rollouts=same))
    assert "top_k_overlap" in shown[1][0]
    assert shown[1][0]["sampler_mismatch"] < 1e-3  # at the first step the rollouts are the student's own


def test_a_cache_holds_the_likeliest_tokens_and_the_rest_of_the_mass(options, tmp_path):
    made, own = cached(options, tmp_path, **{"objective.top_k": "5", "objective.temperature": "0.8"})
    part = load_file(made / "part-00001.safetensors")
    assert part["top_ids"].shape == part["top_logprobs"].shape == (len(part["ids"]), 5)
    assert len(part["lengths"]) == len(part["truncated"]) == 6
    mass = part["top_logprobs"].double().exp().sum(-1)
    torch.testing.assert_close(part["tail"].double().exp(), 1 - mass, rtol=0, atol=1e-6)
    assert mass.min() < 0.999
    # The first rollout, read by the teacher itself.
    from opsd.plugins import Parts
    from opsd.setup import set_up

    setup = set_up(load_config(None, (options | {"objective.temperature": "0.8"}).items()), Parts())
    ids, prompt = part["ids"][: part["lengths"][0]].tolist(), setup.examples[0].teacher
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    logits = teacher(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].detach()
    expected = (logits.double() / 0.8).log_softmax(-1).topk(5)
    torch.testing.assert_close(part["top_logprobs"][: len(ids)].double(), expected.values, rtol=0, atol=1e-4)
    assert (part["top_ids"][: len(ids)] == expected.indices).all()
    # Fewer than it holds, with the rest of the mass as one more entry, unless it is renormalised.
    shown = [trained(own | {"objective.top_k": k, **more}, tmp_path, name)[1][0]["loss"]
             for name, k, more in (("all", "none", {}), ("five", "5", {}), ("three", "3", {}),
                                   ("no tail", "5", {"objective.tail_bucket": "false"}))]  # fmt: skip
    assert shown[0] == shown[1]
    assert len(set(shown)) == 3


def test_the_same_command_goes_on_where_it_was_stopped(options, tmp_path, capsys):
    words = ["cache-teacher", "--output", str(tmp_path / "cache"), *(f"--{n}={v}" for n, v in options.items())]
    assert main(words) == 0
    assert "train from it with --teacher.kind cached" in capsys.readouterr().out
    made = tmp_path / "cache"
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert sorted(before) == ["part-00001.safetensors", "part-00002.safetensors", "part-00003.safetensors",
                              "teacher.json"]  # fmt: skip
    assert main(words) == 2
    assert "holds a finished cache, which is never overwritten" in capsys.readouterr().err
    (made / "teacher.json").unlink()
    (made / "part-00002.safetensors").unlink()
    kept = (made / "part-00001.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert (made / "part-00001.safetensors").stat().st_mtime_ns == kept
    (made / "teacher.json").unlink()
    assert main([*words, "--run.seed", "5"]) == 2
    assert "which is not of this cache" in capsys.readouterr().err


def test_what_a_cache_does_not_fit_is_refused(options, tmp_path):
    made, own = cached(options, tmp_path, **{"objective.top_k": "5"})

    def refused(said, **changes):
        with pytest.raises(ConfigError, match=said):
            trained(own | {name.replace("__", "."): str(value) for name, value in changes.items()}, tmp_path, "out")
        assert not (tmp_path / "out").exists()

    refused(r"objective\.top_k is 6; accepted with teacher\.path .*: 1 to 5", objective__top_k=6)
    refused(r"objective\.temperature is 0\.5; accepted .*: 1\.0", objective__temperature=0.5)
    refused(r"rollout\.per_prompt is 1; accepted .*: 2", rollout__per_prompt=1)
    refused(r"rollout\.max_new_tokens is 4; accepted .*: at least 8", rollout__max_new_tokens=4)
    refused(r"of other data or other prompts: it has nothing of .*other\.jsonl:9 and 1 more",
            data__train=write_rows(tmp_path / "other.jsonl", 10))  # fmt: skip
    refused(r"of other data or other prompts: .*train\.jsonl:1 and 7 more", prompts__student="{problem}!")
    refused(r"objective\.form is 'sampled_token' with teacher\.kind cached", objective__form="sampled_token")
    refused(r"objective\.recipe is 'gkd' with teacher\.kind cached.*; accepted: none", objective__recipe="gkd")
    refused(r"teacher\.reason_first is True with teacher\.kind cached", teacher__reason_first="true")
    refused(r"no finished cache of opsd cache-teacher: teacher\.json", teacher__path=tmp_path / "base")
    with pytest.raises(ConfigError, match=r"top_k must be at most the 90 tokens of the vocabulary, got 99"):
        cache_teacher(load_config(None, (options | {"objective.top_k": "99"}).items()), tmp_path / "more", quiet=True)

    more = tokenizer()
    more.add_tokens(["<more>"])
    model("qwen3", vocab_size=VOCAB + 1).save_pretrained(tmp_path / "grown")
    more.save_pretrained(tmp_path / "grown")
    refused(r"was made with another tokenizer than that of model\.path", model__path=tmp_path / "grown")

    part = made / "part-00002.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-7])
    refused(r"part-00002\.safetensors is missing or damaged: it is not as it was written; opsd cache-teacher makes")
    changed = bytearray(whole)
    changed[-3] ^= 1
    part.write_bytes(bytes(changed))
    refused(r"part-00002\.safetensors is missing or damaged")
    part.unlink()
    refused(r"part-00002\.safetensors is missing or damaged: .*No such file")


def test_a_run_is_resumed_with_its_own_cache_alone(options, tmp_path):
    made, own = cached(options, tmp_path)
    whole, _ = trained(own | {"optim.steps": "4"}, tmp_path, "whole")
    trained(own, tmp_path, "half")
    result = opsd.resume(tmp_path / "half", [("optim.steps", 4)], quiet=True)
    resumed = dict(AutoModelForCausalLM.from_pretrained(result.model_dir).named_parameters())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    manifest = json.loads((made / "teacher.json").read_text())
    (made / "teacher.json").write_text(json.dumps({**manifest, "teacher": "another"}))
    with pytest.raises(ConfigError, match=r"what teacher\.path names has changed"):
        opsd.resume(tmp_path / "half", [("optim.steps", 6)], quiet=True)


def test_check_shows_a_run_from_a_cache(options, tmp_path, capsys):
    _, own = cached(options, tmp_path)
    assert main(["check", *(f"--{name}={value}" for name, value in own.items())]) == 0
    shown = capsys.readouterr().out
    assert "packed rows of the student alone" in shown
    assert "opsd train can start" in shown


class Server(ThreadingHTTPServer):
    """What vLLM answers, of a real model; `broken` changes an answer before it is sent."""

    def __init__(self, directory, most=20):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.words = AutoModelForCausalLM.from_pretrained(directory).eval(), tokenizer()
        self.most, self.asked, self.failures, self.broken = most, [], 0, lambda answer: answer

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def answer(self, path, body):
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "the-teacher", "object": "model", "max_model_len": 512}]}
        if path == "/tokenize":
            ids = self.words(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
        self.asked.append(body)
        choices = []
        for index, ids in enumerate(body["prompt"]):
            logprobs = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            positions = [None]
            for token, row in zip(ids[1:], logprobs, strict=False):
                ranks = row.argsort(descending=True).tolist()
                listed = list(dict.fromkeys([token, *ranks[: body["prompt_logprobs"]]]))  # the token itself first
                positions.append({
                    str(i): {"logprob": max(float(row[i]), -9999.0), "rank": ranks.index(i) + 1, "decoded_token": "x"}
                    for i in listed
                })  # fmt: skip
            choices.append({"index": index, "text": "y", "logprobs": None, "finish_reason": "length",
                            "stop_reason": None, "prompt_logprobs": positions})  # fmt: skip
        usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
        choices.reverse()  # a server need not keep the order
        return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "the-teacher", "choices": choices,
                "usage": usage}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        if server.failures:
            server.failures -= 1
            self.connection.close()
            return
        if body and body.get("prompt_logprobs", 0) > server.most:
            said = f"Requested prompt logprobs of {body['prompt_logprobs']}, greater than max allowed: {server.most}"
            self.send(400, {"error": {"message": said, "type": "BadRequestError", "param": None, "code": 400}})
        else:
            self.send(200, server.broken(server.answer(self.path, body)))

    def send(self, code, answer):
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(options, tmp_path, monkeypatch):
    monkeypatch.setattr(served_teacher.time, "sleep", lambda _: None)
    with Server(tmp_path / "teacher", most=VOCAB) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def test_training_beside_a_server_is_that_beside_its_model(options, tmp_path, server):
    """With all of the vocabulary, on rollouts that follow the student."""
    served = options | {"teacher.kind": "server", "teacher.path": server.address}
    shown = trained(served, tmp_path, "served")
    check_same(shown, trained(options | {"objective.top_k": "none"}, tmp_path, "model"))
    assert {body["model"] for body in server.asked} == {"the-teacher"}
    assert {body["prompt_logprobs"] for body in server.asked} == {VOCAB}
    assert max(len(body["prompt"]) for body in server.asked) == 2  # a micro-batch
    few = trained(served | {"objective.top_k": "5"}, tmp_path, "few")[1]
    made, _ = cached(options, tmp_path, **{"objective.top_k": "5"})
    assert few[0]["loss"] != shown[1][0]["loss"]
    # The same through a cache, which a server may fill, too.
    shutil.rmtree(made)
    of_server, _ = cached(served, tmp_path, **{"objective.top_k": "5"})
    part = load_file(of_server / "part-00001.safetensors")
    with safe_open(of_server / "part-00001.safetensors", "pt") as file:
        assert file.metadata()["of"]
    shutil.rmtree(of_server)
    local, _ = cached(options, tmp_path, **{"objective.top_k": "5"})
    torch.testing.assert_close(part["top_logprobs"], load_file(local / "part-00001.safetensors")["top_logprobs"],
                               rtol=0, atol=1e-4)  # fmt: skip


def test_a_connection_that_fails_is_tried_again_and_then_ends_the_run(options, tmp_path, server):
    options |= {"teacher.kind": "server", "teacher.path": f"{server.address}/v1/", "objective.top_k": "5"}
    server.failures = 2
    trained(options, tmp_path, "once")
    calls = []

    def dies(answer):
        calls.append(answer)
        if len(calls) == 8:  # in the second step
            server.failures = 99
        return answer

    server.broken = dies
    with pytest.raises(RunError, match=r"/v1/completions: no answer: .*step"):
        trained(options, tmp_path, "dies")
    server.failures, server.broken = 0, lambda answer: answer
    assert opsd.resume(tmp_path / "dies", quiet=True).summary["steps"] == 2


def test_what_a_server_does_not_fit_is_refused(options, tmp_path, server):
    options |= {"teacher.kind": "server", "teacher.path": server.address, "objective.top_k": "5"}

    def refused(said, **changes):
        with pytest.raises(ConfigError, match=said):
            trained(options | {n.replace("__", "."): str(value) for n, value in changes.items()}, tmp_path, "out")
        assert not (tmp_path / "out").exists()

    refused(r"needs objective\.top_k", objective__top_k="none")
    refused(r"objective\.temperature is 0\.5 with teacher\.kind server.*; accepted: 1\.0", objective__temperature=0.5)
    refused(r"objective\.top_k is 99; accepted: 1 to 90, the vocabulary", objective__top_k=99)
    refused(r"accepted with teacher\.kind server: http://HOST:PORT", teacher__path="localhost:8000")
    refused(r"/v1/models: no answer", teacher__path="http://127.0.0.1:9")
    server.most = 4
    refused(r"/v1/completions: 400 .*greater than max allowed: 4.*vLLM gives more with --max-logprobs")
    server.most = VOCAB
    server.words.add_tokens(["quick"])
    refused(r"has another tokenizer than the model: of 'The quick")
    server.words = tokenizer()

    def changed(change):
        def broken(answer):
            for choice in answer.get("choices", []):
                change(choice)
            return answer

        server.broken = broken

    changed(lambda choice: choice.pop("prompt_logprobs"))
    refused(r"gave 0 prompt_logprobs for 2 tokens")
    changed(lambda choice: choice["prompt_logprobs"].__setitem__(1, {"3": {"logprob": -1.0}}))
    refused(r"says nothing of token \d+ where it stands")
    changed(lambda choice: [one.update(logprob=-0.1) for one in choice["prompt_logprobs"][1].values()])
    refused(r"gave no log-probabilities of the model's vocabulary")
