"""The embedded tiny set-up: a small language model, its tokenizer and its problems, made from scratch on a CPU.

The problems are additions of two three-digit numbers, and there are two notations for a solution of `457+386`:

- the model's own, column by column from the right, each with its carry in: `7+6+0=13;5+8+1=14;4+3+1=8#843`;
- that of the references, one partial sum for each place from the left, no carries: `700+130+13#843`.

The base model is made by supervised training on its own notation alone. It never has to write a reference; it learns to
read one. Half of its examples show the reference first, and there the work is clean. The other half show the bare
problem, and there the work is unreliable: each column sum is replaced, with probability `guess`, by a random number,
which then carries on into the next column and the answer. So with a reference the base is nearly always right, and
without one it is mostly wrong, whether it samples or decodes greedily. Self-distillation has to carry the first ability
over to the second. No problem is shared between the base model's training, the training set and the held-out set, not
even with its operands swapped.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from opsd.presets import TINY as SETTINGS
from opsd.scoring import supervised_loss

__all__ = ["SETTINGS", "own_solution", "prepare", "reference_solution"]

DIGITS = 3
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
ALPHABET = "0123456789+=;#:AQR\n"


@dataclass(frozen=True)
class _Build:
    """What determines the base model and the data, apart from the seed and this file."""

    steps: int = 400
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 20
    guess: float = 0.5
    train_problems: int = 2000
    eval_problems: int = 500
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    digits: int = DIGITS
    device: str = "cpu"


def reference_solution(x: int, y: int, digits: int = DIGITS) -> str:
    """The privileged solution: partial sums by place, largest first, then the answer."""
    places = [10**i for i in reversed(range(digits))]
    return "+".join(str((x // p % 10 + y // p % 10) * p) for p in places) + f"#{x + y}"


def own_solution(x: int, y: int, digits: int = DIGITS, *, guess: float = 0.0, rng: random.Random | None = None) -> str:
    """The model's own notation: columns from the right with carry, then the answer read off them.

    With `rng` each column sum is, with probability `guess`, a random number from 0 to 19 instead. What follows is
    consistent with it, so one guess usually spoils the answer.
    """
    columns, answer, carry = [], "", 0
    for i in range(digits):
        a, b = x // 10**i % 10, y // 10**i % 10
        total = a + b + carry
        if rng is not None and rng.random() < guess:
            total = rng.randrange(20)
        columns.append(f"{a}+{b}+{carry}={total}")
        carry, digit = divmod(total, 10)
        answer = f"{digit}{answer}"
    return ";".join(columns) + "#" + (str(carry) if carry else "") + answer


def prepare(
    directory: Path | None = None,
    *,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
    _build: _Build = _Build(),
) -> Path:
    """Build the set-up once and return its directory: `model/`, `train.jsonl` and `eval.jsonl`.

    The rows have `problem`, `solution` (the reference), `answer` and `own_solution` (clean, in the model's notation).
    The default directory is a cache under `$XDG_CACHE_HOME` or `~/.cache`, named after a hash of everything that
    determines the result; a directory that already holds this very build is returned as it is. `on_step(step, total,
    loss)` is called after each training step of the base model. The same seed gives the same result on one machine with
    the same number of threads. Global random state is left alone.
    """
    identity = [
        Path(__file__).read_text(encoding="utf-8"),
        repr((_build, SETTINGS["prompts"])),
        seed,
        torch.__version__,
        transformers.__version__,
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    if directory is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = cache / "opsd" / f"tiny-{key}-seed{seed}"
    directory = Path(directory).absolute()
    if _holds(directory, key):
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not this build of the tiny set-up; give an empty directory")

    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        base, train, held_out = _problems(seed, _build)
        tokenizer = _tokenizer()
        model = _base_model(base, tokenizer, seed, _build, on_step)
        model.save_pretrained(scratch / "model")
        tokenizer.save_pretrained(scratch / "model")
        for name, pairs in (("train", train), ("eval", held_out)):
            lines = "".join(json.dumps(_row(x, y, _build.digits)) + "\n" for x, y in pairs)
            (scratch / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (scratch / "build.json").write_text(json.dumps({"key": key, "seed": seed}) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        try:
            scratch.replace(directory)
        except OSError:
            if not _holds(directory, key):  # else another process has finished the same build first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _holds(directory: Path, key: str) -> bool:
    try:
        return json.loads((directory / "build.json").read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _row(x: int, y: int, digits: int) -> dict[str, str]:
    return {
        "problem": f"{x}+{y}",
        "solution": reference_solution(x, y, digits),
        "answer": str(x + y),
        "own_solution": own_solution(x, y, digits),
    }


def _problems(seed: int, build: _Build) -> tuple[list, list, list]:
    """Pairs of numbers for the base model, for training and for evaluation; all distinct, in either order."""
    least, end = 10 ** (build.digits - 1), 10**build.digits
    rng = random.Random(f"problems-{seed}")
    n_base = build.steps * build.batch_size
    pairs: dict[tuple[int, int], tuple[int, int]] = {}
    while len(pairs) < n_base + build.train_problems + build.eval_problems:
        x, y = (rng.randrange(least, end) for _ in range(2))
        pairs.setdefault((min(x, y), max(x, y)), (x, y))
    drawn = list(pairs.values())
    return drawn[:n_base], drawn[n_base : n_base + build.train_problems], drawn[n_base + build.train_problems :]


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, no merges; nothing is added on encoding and nothing tidied on decoding."""
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNK, *ALPHABET])}
    characters = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _base_model(
    pairs: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    build: _Build,
    on_step: Callable[[int, int, float], None] | None,
) -> Any:
    """Supervised training on own-notation work: clean with the reference in the prompt, unreliable without it."""
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=build.hidden_size,
        intermediate_size=3 * build.hidden_size,
        num_hidden_layers=build.layers,
        num_attention_heads=build.heads,
        num_key_value_heads=build.heads,
        head_dim=build.hidden_size // build.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,  # a model this narrow learns faster from it than from the usual 0.02
        **tokens,
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        model.to(build.device)
        model.generation_config = GenerationConfig(**tokens)
        optimizer = torch.optim.AdamW(model.parameters(), lr=build.lr, betas=(0.9, 0.95), weight_decay=0.01)
        rng = random.Random(f"guesses-{seed}")
        for step in range(build.steps):
            warmup, decay = (step + 1) / build.warmup, 2 * (1 - step / build.steps)
            for group in optimizer.param_groups:
                group["lr"] = build.lr * min(1.0, warmup, decay)
            batch = pairs[step * build.batch_size : (step + 1) * build.batch_size]
            prompts, completions = zip(
                *(_example(tokenizer, x, y, i % 2 == 0, build, rng) for i, (x, y) in enumerate(batch)), strict=True
            )
            loss = supervised_loss(model, prompts, completions, sum(map(len, completions)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if on_step is not None:
                on_step(step + 1, build.steps, loss.item())
    return model.eval()


def _example(
    tokenizer: PreTrainedTokenizerFast, x: int, y: int, aided: bool, build: _Build, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Token ids of one prompt and of the work after it, its end token included."""
    template = SETTINGS["prompts"]["teacher" if aided else "student"]
    prompt = template.format(problem=f"{x}+{y}", solution=reference_solution(x, y, build.digits))
    work = own_solution(x, y, build.digits, guess=build.guess, rng=None if aided else rng)
    return tokenizer.encode(prompt), [*tokenizer.encode(work), tokenizer.eos_token_id]
