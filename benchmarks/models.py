"""Which causal language models of transformers work: each is made tiny, with random weights, and tried.

    python -m benchmarks.models [--only NAME ...] [--seconds 60]

For each type that `AutoModelForCausalLM` knows: whether `lm_head_of` reads its head, whether `dual_hidden_states` takes
it in two passes and in one, whether a padded batch gives what single passes give, and whether prompts in a batch are
continued as they are alone. All of it is compared with
separate plain passes, hidden states and gradients, on contexts longer than the trial that the package makes itself and
longer than the sliding windows. Results go to results/models.json and, as a table, into the README.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.report import replace_section
from opsd.batching import tried_engine
from opsd.engines import GenerateEngine
from opsd.options import ModelConfig

RESULTS = Path(__file__).parent / "results" / "models.json"
VERDICTS = {
    "packed": "packed, in two passes or one",
    "two passes": "packed, in two passes",
    "padded": "padded",
    "refused": "refused",
    "not built": "not tried: no tiny one could be made of generic sizes",
    "wrong": "WRONG: accepted, and not what plain passes give",
}
LIMIT = 1e-4  # relative: models go through float32 in places, whatever their type

# What configs call their sizes. A config gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 96),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim",
                     "dense_intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "dim_head",
                     "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "swa_v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts",
                     "moe_num_shared_experts", "num_dense_layers"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "shared_intermediate_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_n_heads", "mamba_num_heads", "ssm_state_size",
                     "mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim",
                     "index_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_expand": 2, "mamba_d_ssm": 64, "time_step_rank": 2, "index_topk": 64,
    "sliding_window": 6, "is_decoder": True, "layer_types": None, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "output_router_logits": False,
}  # fmt: skip


# Where some sizes exclude each other, the first of these that gives a model that runs.
OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"layer_types": None},
    {"layer_types": None, "num_key_value_heads": 4},
    {"head_dim": ..., "layer_types": ...},
)


def tiny_config(kind: type, otherwise: dict[str, Any]) -> Any:
    """A config of class `kind` with small sizes and without dropout; `...` leaves a default."""
    default = kind()
    fixed = {n for c in kind.__mro__ for n, v in vars(c).items() if isinstance(v, property)}
    changes = {k: v for k, v in {**SIZES, **otherwise}.items() if _has(default, k) and k not in fixed}
    kinds = vars(default).get("layer_types")
    if not kinds:
        changes.pop("layer_types", None)
    elif "layer_types" not in otherwise:  # each kind that the default has
        changes["layer_types"] = list(itertools.islice(itertools.cycle(dict.fromkeys(kinds)), 4))
    for name, value in vars(default).items():
        if ("dropout" in name or "pdrop" in name or name in ("layerdrop", "drop")) and isinstance(value, float):
            changes[name] = 0.0
        if name in ("sliding_window", "q_lora_rank", "o_lora_rank") and value is None:
            changes.pop(name, None)
    for name, part in getattr(kind, "sub_configs", {}).items():
        if getattr(default, name, None) is not None and hasattr(part, "model_type"):
            changes[name] = tiny_config(type(getattr(default, name)), otherwise).to_dict()
    return kind(**{k: v for k, v in changes.items() if v is not ...})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # it differs by layer
        return False


def tiny_model(name: str) -> Any:
    """In float64, or float32 if it runs in that alone, with weights that let attention matter.

    Raises:
        Exception: it cannot be made so, or does not run on token ids alone.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    found = CLASSES[name]
    kind = getattr(transformers, found if isinstance(found, str) else found[0])
    first: Exception | None = None
    for otherwise in OTHERWISE:
        try:
            return _running(kind, tiny_config(transformers.CONFIG_MAPPING[name], otherwise))
        except Exception as failure:
            first = first or failure
    assert first is not None
    raise first


def _running(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > 2e7:
        raise ValueError(f"of {size / 1e6:.0f} M parameters even so")
    torch.manual_seed(0)
    model = kind(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.requires_grad:
                parameter.normal_(std=0.2)
        try:
            model.double()(torch.tensor([[3, 4, 5]]), use_cache=False)
        except RuntimeError:
            model.float()(torch.tensor([[3, 4, 5]]), use_cache=False)
    return model


def contexts() -> tuple[list[list[int]], list[list[int]], list[list[list[int]]]]:
    """Prompts of the student, of the teacher, and several rollouts of each."""
    draw = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 90, (n,), generator=draw).tolist()

    students = [tokens(9), tokens(4)]
    return students, [[*students[0][:6], *tokens(9)], tokens(7)], [[tokens(7), tokens(11)], [tokens(5)]]


def plain(model: Any, prompts: list[list[int]], rollouts: list[list[list[int]]]) -> Tensor:
    """(R, H) by one pass per rollout, with the model's own attention."""
    found = []
    for prompt, own in zip(prompts, rollouts, strict=True):
        for rollout in own:
            out = model.base_model(input_ids=torch.tensor([[*prompt, *rollout[:-1]]]), use_cache=False)
            found.append(out.last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(found)


def padded(model: Any, prompts: list[list[int]], rollouts: list[list[list[int]]]) -> Tensor:
    """The same of one batch, padded on the right."""
    pairs = [(p, r) for p, own in zip(prompts, rollouts, strict=True) for r in own]
    width = max(len(p) + len(r) - 1 for p, r in pairs)
    ids = torch.tensor([[*p, *r[:-1], *[0] * (width - len(p) - len(r) + 1)] for p, r in pairs])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.cat([h[len(p) - 1 : len(p) - 1 + len(r)] for h, (p, r) in zip(hidden, pairs, strict=True)])


def gradients(model: Any, hidden: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    trained = [p for p in model.base_model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((hidden * weights).sum(), trained, allow_unused=True, materialize_grads=True))


def error(got: Any, want: Any) -> float:
    """The largest, relative to the largest value."""
    if isinstance(want, list):
        size = max(float(w.abs().max()) for w in want)
        return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / max(size, 1e-30)
    return float(((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).nan_to_num(torch.inf))


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention as the model's source states it: sdpa leaves a softcap out in silence."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


def _attempt(action: Callable[[], float]) -> dict[str, Any]:
    """What came of it: the error in figures, or the reason why not."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            found = action()
    except Exception as failure:
        text = str(failure).splitlines()[0] if str(failure) else ""
        return {"reason": text if isinstance(failure, ValueError) else f"{type(failure).__name__}: {text}"}
    untried = [str(w.message) for w in said if "could not be tried" in str(w.message)]
    return {"error": found, **({"untried": untried[0]} if untried else {})}


def examine(name: str) -> dict[str, Any]:
    """All that is found out about one type of model."""
    import opsd_kernels

    try:
        model = tiny_model(name)
    except Exception as failure:
        text = str(failure).splitlines()[0] if str(failure) else ""
        return {"verdict": "not built", "reason": f"{type(failure).__name__}: {text}"[:300]}
    data = students, teachers, rollouts = contexts()

    def head() -> float:
        read = opsd_kernels.lm_head_of(model)
        ids = torch.tensor([students[0]])
        with torch.no_grad():
            z = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.to(read.weight.dtype) @ read.weight.T
            z = (z if read.bias is None else z + read.bias) * read.logit_scale
            z = z if read.softcap is None else read.softcap * torch.tanh(z / read.softcap)
            logits = model(input_ids=ids, use_cache=False).logits
            return error(z[..., : logits.shape[-1]], logits.double())

    def packed(passes: str) -> float:
        with eager(model):
            student = plain(model, students, rollouts)
            with torch.no_grad():
                teacher = plain(model, teachers, rollouts)
        got = opsd_kernels.dual_hidden_states(model, opsd_kernels.pack_dual_context(*data), passes=passes)
        found = gradients(model, got.student), gradients(model, student)
        return max(error(got.student, student), error(got.teacher, teacher), error(*found))

    def batch() -> float:
        student, rows = plain(model, students, rollouts), padded(model, students, rollouts)
        return max(error(rows, student), error(gradients(model, rows), gradients(model, student)))

    found: dict[str, Any] = {"class": type(model).__name__, "head": _attempt(head)}
    found |= {"two": _attempt(lambda: packed("two")), "joint": _attempt(lambda: packed("joint"))}
    found["padded"] = _attempt(batch)
    found["written alone"] = writes_alone(model)
    return {"verdict": verdict(found), **found}


def writes_alone(model: Any) -> str | None:
    """Why `opsd` has the model continue one prompt at a time, or that it cannot write at all; None for neither."""
    engine, model = GenerateEngine([2], 0, ModelConfig()), model.float()  # whose masks hold the least float32
    try:
        engine.check(model, "it")
        return tried_engine(engine, 20, model).alone
    except Exception as failure:
        return f"cannot write: {str(failure).splitlines()[0][:300]}"


def verdict(found: dict[str, Any]) -> str:
    """One of `VERDICTS`. A padded batch is not checked by the package, so a wrong one means that it does not work."""
    if any(not found[k].get("error", 0) <= LIMIT for k in ("head", "two", "joint")):
        return "wrong"
    if "reason" in found["head"]:
        return "refused"
    if "error" in found["joint"] and "error" in found["two"]:
        return "packed"
    if "error" in found["two"]:
        return "two passes"
    return "padded" if found["padded"].get("error", 1) <= LIMIT else "refused"


def reason(found: dict[str, Any]) -> str:
    """Why the verdict is not better, in words that do not name the model."""
    kind = found["verdict"]
    if kind == "packed":
        return ""
    if kind == "not built":
        return str(found["reason"])
    if kind == "refused" and found["head"].get("reason", "").startswith("AttributeError"):
        return short(found["two"]["reason"])  # no body to take hidden states from
    if kind == "refused" and "reason" not in found["head"]:
        off = (
            found["padded"].get("reason")
            or f"padding on the right changes the other rows by {found['padded']['error']:.1g}"
        )
        return f"{short(found['two']['reason'])}; {off}"
    return short(
        found[{"two passes": "joint", "padded": "two", "refused": "head"}.get(kind, "two")].get("reason", kind)
    )


def short(text: str) -> str:
    """Without the frame that every message has."""
    text = re.sub(r"^.*cannot run on packed rows: |^passes='joint' is not possible: |; accepted here: 'two'$", "", text)
    text = re.sub(
        r"^model does something to its logits that is not understood \(\w+: |\); build opsd_kernels.*$", "", text
    )
    return text


def table(results: dict[str, Any]) -> str:
    """The README's: one row per verdict and reason."""
    models = results["models"]
    counts = {v: sum(m["verdict"] == v for m in models.values()) for v in VERDICTS}
    lines = ["| | models | which |", "|---|---|---|"]
    for kind in ("packed", "two passes", "padded"):
        names = ", ".join(n for n, m in models.items() if m["verdict"] == kind)
        lines.append(f"| {VERDICTS[kind]} | {counts[kind]} | {names} |")
    for kind in ("refused", "not built", "wrong"):
        if counts[kind]:
            names = ", ".join(n for n, m in models.items() if m["verdict"] == kind)
            lines.append(f"| {VERDICTS[kind]} | {counts[kind]} | {names} |")
    runs = {n: m.get("written alone") or "" for n, m in models.items() if m["verdict"] in list(VERDICTS)[:3]}
    for what, begins in (("of the packed and padded: one prompt is continued at a time", False),
                         ("of the packed and padded: they cannot write", True)):  # fmt: skip
        names = [n for n, why in runs.items() if why and why.startswith("cannot write") is begins]
        if names:
            lines.append(f"| {what} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


def _child(name: str, into: Connection) -> None:
    torch.set_num_threads(1)
    into.send(examine(name))


def in_a_process(name: str, seconds: float) -> dict[str, Any]:
    """`examine(name)` in a process of its own, which may end badly or take too long."""
    fork = multiprocessing.get_context("fork")  # so that only one process imports everything
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv() if ours.poll(seconds) else {}
        why = f"took more than {seconds:g} s"
    except EOFError:
        process.join()
        found, why = {}, f"its process ended with code {process.exitcode}"
    process.kill()
    process.join()
    return found or {"verdict": "not built", "reason": why}


def main() -> None:
    import transformers  # so that the processes need not
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="these types alone, the others as they are in the file")
    parser.add_argument("--seconds", type=float, default=60, help="at most, for each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    models: dict[str, Any] = dict(old.get("models", {})) if options.only else {}
    torch.set_num_threads(1)
    examine("llama")  # imports what every process needs, once
    for name in options.only or sorted(CLASSES):
        models[name] = in_a_process(name, options.seconds)
        print(f"{name}: {models[name]['verdict']}: {reason(models[name])}"[:200], flush=True)
        results = {"machine": machine(torch.device("cpu")), "models": dict(sorted(models.items()))}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.out == RESULTS:
        replace_section("models", table(results))
    for kind, found in itertools.groupby(sorted(m["verdict"] for m in models.values())):
        print(kind, len(list(found)))


if __name__ == "__main__":
    main()
