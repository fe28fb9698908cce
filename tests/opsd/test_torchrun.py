"""Several processes on one run: real ones, launched by torchrun, on gloo."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from _models import model, write_model, write_rows
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0", "--nproc-per-node"]


@pytest.fixture
def options(tmp_path):
    write_model(tmp_path / "base", "qwen3")
    found = {
        "model.path": tmp_path / "base",
        "data.train": write_rows(tmp_path / "train.jsonl", 9),
        "data.eval": write_rows(tmp_path / "eval.jsonl", 5),
        "optim.steps": 3,
        "optim.batch_size": 3,
        "optim.micro_batch_size": 2,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 0,
        "rollout.max_new_tokens": 8,
        "rollout.per_prompt": 3,
        "eval.scorer": "exact",
        "run.device": "cpu",
        "run.checkpoint_every": 1,
        "run.process_minutes": 1,
    }
    return {name: str(value) for name, value in found.items()}


def launch(count, *words, **more):
    threads = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    given = {"env": os.environ | threads, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | more
    launcher = [*LAUNCH, str(count), "-m"] if count > 1 else [sys.executable, "-m"]
    return subprocess.Popen([*launcher, "opsd", "train", *words], **given)


def words_of(options, directory):
    return [*(f"--{name}={value}" for name, value in options.items()), f"--run.dir={directory}"]


def trained(count, options, directory):
    process = launch(count, *words_of(options, directory))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def records(directory, name="metrics"):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def weights(directory):
    (path,) = (directory / "model").glob("*.safetensors")
    return load_file(path)


KINDS = {
    "divided": {},
    "whole": {"run.shard": "false"},
    "divided, untied, padded": {"teacher.kind": "ema", "model.packing": "off"},
    "divided, checkpointing": {"teacher.kind": "live", "model.gradient_checkpointing": "true"},
    "divided, three contexts": {"objective.recipe": "purified"},
    "divided, idle processes": {"objective.recipe": "msd"},
    "adapters": {"lora.enabled": "true", "lora.r": "4", "teacher.kind": "ema"},
    "rewards": {"objective.recipe": "rlsd", "lora.enabled": "true", "model.packing": "off"},
}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["divided", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in list(KINDS)[1:])])
def test_several_processes_take_the_steps_of_one(options, tmp_path, kind, count):
    """Nine rollouts a step in groups of two or three: no count of processes divides them alike."""
    options |= KINDS[kind]
    words = tmp_path / "base" / "tokenizer.json"  # of which one id, in no row, has no token
    known = json.loads(words.read_text())
    del known["model"]["vocab"]["<"]
    words.write_text(json.dumps(known))
    if "untied" in kind:
        path = options["model.path"]
        model("qwen3", tie_word_embeddings=False).save_pretrained(path)
    trained(1, options, tmp_path / "one")
    said = trained(count, options, tmp_path / "all")
    assert said.count("step 3/3") == 1  # one alone prints
    assert "has no token: never written" in said
    assert (f"weights: divided among {count} processes" in said) == kind.startswith("divided"), said
    assert "Warning" not in said.replace("FutureWarning", "")
    for one, own in zip(records(tmp_path / "one"), records(tmp_path / "all"), strict=True):
        left_out = "seconds", "peak", "tokens_per", "top_k_overlap", "warnings"
        one, own = ({n: v for n, v in record.items() if not n.startswith(left_out)} for record in (one, own))
        assert own == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert records(tmp_path / "one", "evaluations") == records(tmp_path / "all", "evaluations")
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "all")[name], value, rtol=0, atol=2e-5, msg=name)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def worker(launcher, number):
    """The process id of a rank."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher.pid and f"RANK={number}".encode() in environment:
            return pid
    raise AssertionError(f"no process {number}")


ADAPTERS = {"lora.enabled": "true", "lora.r": "4", "lora.dropout": "0.2"}
AVERAGE = {"teacher.kind": "ema", "model.autocast": "bfloat16"}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("kind", "again"),
    [(AVERAGE, 2), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in [(ADAPTERS, 2), (ADAPTERS, 1)])],
)
def test_a_killed_process_ends_the_run_which_goes_on_as_if_it_never_had(options, tmp_path, kind, again):
    options |= {**kind, "optim.steps": "40"}
    killed, metrics = tmp_path / "killed", tmp_path / "killed" / "metrics.jsonl"
    process = launch(2, *words_of(options, killed))
    wait_for(lambda: (killed / "checkpoints" / "step-00000002").exists() or _steps(metrics) > 2, process)
    os.kill(worker(process, 1), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "process 0 of 2 goes on no further" in said, said
    assert "rank      : 1" in said, said
    done = _steps(metrics)
    assert 2 <= done < 40
    process = launch(again, f"--resume={killed}", f"--optim.steps={done + 3}")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "going on after step" in said, said
    if again == 2:  # bit for bit, as dropout is another where others share the work
        trained(2, options | {"optim.steps": str(done + 3)}, tmp_path / "whole")
        for name, value in weights(tmp_path / "whole").items():
            assert torch.equal(weights(killed)[name], value), name


def _steps(metrics):
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


MEASURE = """
import gc, json, os, sys
import opsd
from opsd_kernels import Head
from opsd.loop import Loop
from torch.distributed.tensor import DTensor

def size(tensors):
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors if t is not None)

def apply(self, *given, original=Loop._apply):
    parameters = list(self.run.model.parameters())
    found = {"weights": size(parameters), "gradients": size(p.grad for p in parameters)}
    found["teacher"] = size(self.run.teacher.model.parameters())
    gc.collect()
    found["left"] = sum(type(o) is Head and not isinstance(o.weight, DTensor) for o in gc.get_objects())
    applied = original(self, *given)
    state = self.optimizer.state.values()
    found["optimiser"] = size(v for own in state for n, v in own.items() if n != "step")
    with open(os.path.join(sys.argv[2], "held-" + os.environ["RANK"]), "w") as file:
        json.dump(found, file)
    return applied

Loop._apply = apply
opsd.train(json.loads(sys.argv[1]), quiet=True)
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_each_process_holds_its_share(options, tmp_path, count):
    (tmp_path / "measure.py").write_text(MEASURE)
    config = {}
    for name, value in {**options, "optim.steps": 1, "run.dir": str(tmp_path / "out")}.items():
        section, option = name.split(".")
        config.setdefault(section, {})[option] = value if option in ("path", "dir", "device") else _plain(value)
    launched = [*LAUNCH, str(count), str(tmp_path / "measure.py"), json.dumps(config), str(tmp_path)]
    ran = subprocess.run(launched, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads((tmp_path / f"held-{rank}").read_text()) for rank in range(count)]
    whole = sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    for own in found:
        for name, times in (("weights", 1), ("gradients", 1), ("teacher", 1), ("optimiser", 2)):
            assert own[name] == pytest.approx(times * whole / count, rel=0.1), name
        assert own["left"] == 0  # of the set-up, which had the head whole


def _plain(value):
    with contextlib.suppress(ValueError):
        return json.loads(str(value))
    return str(value)


@pytest.mark.exhaustive
def test_a_process_that_hangs_is_named(options, tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import os, time\n"
        "def score(text, row):\n"
        "    time.sleep(600 if os.environ['RANK'] == '1' else 0)\n"
        "    return 1.0\n"
    )
    options |= {"eval.scorer": f"{tmp_path / 'hangs.py'}:score", "run.process_minutes": "0.1"}
    process = launch(2, *words_of(options, tmp_path / "out"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode
    assert "process 0 of 2 goes on no further" in said, said
    assert "Ranks 1 failed to pass monitoredBarrier in 6000 ms" in said, said


@pytest.fixture
def nodes():
    """Commands that run something on one of two machines, which are network namespaces joined by a cable."""
    names = [f"opsd-{os.getpid()}-{end}" for end in "ab"]
    cable = [f"opsd{os.getpid() % 10**8}{end}" for end in "ab"]
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", cable[0], "netns", names[0], "type", "veth", "peer", cable[1], "netns", names[1]]]
    for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
        commands += [["-n", name, "address", "add", f"10.77.0.{number}/24", "dev", end]]
        commands += [["-n", name, "link", "set", device, "up"] for device in (end, "lo")]
    try:
        for command in commands:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        yield [["ip", "netns", "exec", n, "env", f"GLOO_SOCKET_IFNAME={c}"] for n, c in zip(names, cable, strict=True)]
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the program ip")
@pytest.mark.exhaustive
def test_two_nodes_take_the_steps_of_one(options, tmp_path, nodes):
    trained(1, options, tmp_path / "one")
    processes = []
    for number, node in enumerate(nodes):
        meeting = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", "--max-restarts", "0"]
        meeting += ["--master-addr", "10.77.0.1", "--master-port", "29517"]
        command = [*node, sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "opsd", "train"]
        given = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen([*command, *words_of(options, tmp_path / "all")], text=True, **given))
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "weights: divided among 2 processes" in said[0]
    assert "step 3/3" not in said[1]
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "all")[name], value, rtol=0, atol=2e-5, msg=name)


def test_what_one_process_refuses_is_said_once(options, tmp_path):
    trained(1, options, tmp_path / "out")
    process = launch(2, *words_of(options, tmp_path / "out"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode, said
    assert said.count("already holds a run, which is never overwritten") == 1, said
