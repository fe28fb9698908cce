"""What a teacher thought of fixed rollouts, as files: made once, then trained from without the teacher.

A cache is a directory of `teacher.json`, its manifest, which is written last, and of safetensors parts. A part holds E
examples with G rollouts each, R tokens in all, one after another:

    lengths (E·G,) int32         ids (R,) int32                 truncated (E·G,) bool
    top_ids (R, k) int32         top_logprobs (R, k) float32    tail (R,) float32, the log of the mass outside the k
    sampler_logprobs (R,) float32, where the rollouts were sampled

The rollouts are the student's of when the cache was made. A training from it is therefore off-policy, the more so the
longer it lasts; `rollout.importance_cap` weights tokens for it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from opsd.config import Config
from opsd.errors import ConfigError, one_line
from opsd.files import replace_file
from opsd.prompts import Encoded, Example
from opsd.recipes.base import columns
from opsd.recipes.batch import TopK
from opsd.rollouts import Rollout
from opsd.run import Engine, Run
from opsd.top_k import TopKTeacher
from opsd_kernels import Head

MANIFEST, VERSION = "teacher.json", 1


def key_of(example: Example) -> str:
    """What an example is known by: both prompts, as ids."""
    return hashlib.sha256(json.dumps([example.student, example.teacher]).encode()).hexdigest()[:20]


def vocabulary_digest(tokenizer: Any) -> str:
    """The same for tokenizers that give the same ids to the same tokens."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:20]


def pack_part(rollouts: Sequence[Rollout], known: TopK, of: str) -> bytes:
    """A part as the bytes of its file; `of` says what cache it belongs to."""
    tokens = [token for rollout in rollouts for token in rollout.ids]
    ids, logprobs = known.ids.cpu(), known.logprobs.float().cpu()
    tensors = {
        "lengths": torch.tensor([len(rollout.ids) for rollout in rollouts], dtype=torch.int32),
        "ids": torch.tensor(tokens, dtype=torch.int32),
        "truncated": torch.tensor([rollout.truncated for rollout in rollouts]),
        "top_ids": ids.to(torch.int32).contiguous(),
        "top_logprobs": logprobs.contiguous(),
        "tail": torch.log1p(-logprobs.double().exp().sum(-1).clamp(max=1)).float(),
    }
    if all(rollout.logprobs is not None for rollout in rollouts):
        tensors["sampler_logprobs"] = torch.tensor([value for rollout in rollouts for value in rollout.logprobs or ()])
    return save(tensors, {"of": of})


def part_of(path: Path) -> str | None:
    """The cache that the part at `path` belongs to; None where it is not there whole."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("of")
    except (OSError, SafetensorError):
        return None


def write_manifest(directory: Path, parts: Sequence[tuple[Path, Sequence[str]]], **described: Any) -> None:
    """Ends the cache in `directory`, whose parts hold examples with these keys."""
    listed = [{"file": path.name, **_sum_of(path), "examples": list(keys)} for path, keys in parts]
    manifest = {"version": VERSION, **described, "parts": listed}
    replace_file(directory / MANIFEST, json.dumps(manifest) + "\n")


def _sum_of(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Entry:
    """An example's rollouts in a cache: where each begins in its part, and how long it is."""

    part: int
    spans: tuple[tuple[int, int], ...]
    numbers: range


class TeacherCache:
    """The cache in `directory`, whose files are all there and whole.

    Raises:
        ConfigError: it is none, or a file of it is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.where = f"teacher.path {str(directory)!r}"
        self.manifest = self._manifest(directory)
        self.digest = hashlib.sha256(json.dumps(self.manifest).encode()).hexdigest()[:16]
        self._parts, self._entries = [], dict[str, Entry]()
        for number, part in enumerate(self.manifest["parts"]):
            path = directory / part["file"]
            try:
                if _sum_of(path) != {name: part[name] for name in ("bytes", "sha256")}:
                    raise ValueError("it is not as it was written")
                file = safe_open(path, "pt")
                lengths = file.get_tensor("lengths").tolist()
            except (OSError, ValueError, SafetensorError) as error:
                said = f"{self.where}: {part['file']} is missing or damaged: {one_line(error)}"
                raise ConfigError(f"{said}; opsd cache-teacher makes it anew") from error
            self._parts.append(file)
            each = self.manifest["rollouts"]["per_prompt"]
            ends = list(accumulate(lengths))
            for place, key in enumerate(part["examples"]):
                own = range(place * each, (place + 1) * each)
                spans = tuple((ends[i] - lengths[i], ends[i]) for i in own)
                self._entries.setdefault(key, Entry(number, spans, own))

    def _manifest(self, directory: Path) -> dict[str, Any]:
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            if manifest["version"] != VERSION:
                raise ValueError(f"its version is {manifest['version']!r}; accepted: {VERSION}")
            return manifest
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"{self.where} is no finished cache of opsd cache-teacher: {MANIFEST}: {one_line(error)}"
            raise ConfigError(said) from error

    def __contains__(self, example: Example) -> bool:
        return key_of(example) in self._entries

    def rollouts(self, example: Example) -> list[Rollout]:
        entry = self._entries[key_of(example)]
        found = []
        for number, (start, stop) in zip(entry.numbers, entry.spans, strict=True):
            ids = self._slice(entry, "ids", start, stop)
            known = "sampler_logprobs" in self._parts[entry.part].keys()  # noqa: SIM118
            logprobs = self._slice(entry, "sampler_logprobs", start, stop).tolist() if known else None
            truncated = bool(self._slice(entry, "truncated", number, number + 1))
            found.append(Rollout(ids.tolist(), truncated, logprobs))
        return found

    def top_k(self, example: Example, ids: Sequence[int], k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, k) ids and log-probabilities of the rollout `ids`; a KeyError if it is none of the cache."""
        entry = self._entries[key_of(example)]
        for start, stop in entry.spans:
            if stop - start == len(ids) and self._slice(entry, "ids", start, stop).tolist() == list(ids):
                own = (self._slice(entry, name, start, stop)[:, :k] for name in ("top_ids", "top_logprobs"))
                top_ids, logprobs = own
                return top_ids.long(), logprobs
        raise KeyError(example.row.source)

    def _slice(self, entry: Entry, name: str, start: int, stop: int) -> torch.Tensor:
        return self._parts[entry.part].get_slice(name)[start:stop]


class CachedTeacher(TopKTeacher):
    """The teacher of a cache.

    Raises:
        ConfigError: the cache was made with another vocabulary, or does not fit an option of `config`.
    """

    def __init__(self, config: Config, head: Head, tokenizer: Any, device: torch.device):
        self.cache = TeacherCache(Path(config.teacher.path or ""))
        made, where = self.cache.manifest, self.cache.where
        if made["tokenizer"] != vocabulary_digest(tokenizer) or made["columns"] != columns(head):
            raise ConfigError(f"{where} was made with another tokenizer than that of model.path {config.model.path!r}")
        asked = config.objective.top_k or made["k"]
        if asked > made["k"]:
            raise ConfigError(f"objective.top_k is {asked}; accepted with {where}: 1 to {made['k']}, what it holds")
        options: Mapping[str, Any] = {
            "objective.temperature": (config.objective.temperature, made["temperature"]),
            "rollout.per_prompt": (config.rollout.per_prompt, made["rollouts"]["per_prompt"]),
            "rollout.temperature": (config.rollout.temperature, made["rollouts"]["temperature"]),
        }
        for name, (value, accepted) in options.items():
            if value != accepted:
                raise ConfigError(f"{name} is {value}; accepted with {where}: {accepted}, as it was made")
        most, longest = config.rollout.max_new_tokens, made["rollouts"]["max_new_tokens"]
        if most < longest:
            raise ConfigError(f"rollout.max_new_tokens is {most}; accepted with {where}: at least {longest}")
        super().__init__(head, asked, device)

    def check(self, examples: Sequence[Example]) -> None:
        """Refuses data that the cache was not made of."""
        lost = [example.row.source for example in examples if example not in self.cache]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ConfigError(
                f"{self.cache.where} was made of other data or other prompts: it has nothing of {lost[0]}{more}"
            )

    def top_k(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> TopK:
        try:
            found = [self.cache.top_k(e, r.ids, self.k) for e, r in zip(examples, rollouts, strict=True)]
        except KeyError as error:
            raise ConfigError(f"{self.cache.where} has no such rollout of {error.args[0]}") from error
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.cache.where} can no longer be read: {one_line(error)}") from error
        ids, logprobs = (torch.cat(own).to(self.device) for own in zip(*found, strict=True))
        return TopK(ids, logprobs)


@dataclass(frozen=True)
class CachedEngine:
    """Gives out a cache's rollouts; `engine` writes all the rest."""

    cache: TeacherCache
    engine: Engine

    @property
    def end_ids(self) -> Sequence[int]:
        return self.engine.end_ids

    def rollouts(self, run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
        return [rollout for example in examples for rollout in self.cache.rollouts(example)]

    def write(self, *given: Any) -> list[Rollout]:
        return self.engine.write(*given)


def with_cache(engine: Any, teacher: Any, train: Encoded) -> Any:
    """`engine`, or where the teacher is cached the rollouts of its cache, which has to hold all examples.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(teacher, CachedTeacher):
        return engine
    teacher.check(train.examples)
    return CachedEngine(teacher.cache, engine)
