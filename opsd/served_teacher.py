"""A teacher on a vLLM server: its likeliest tokens at each position of a prompt, over HTTP.

What is asked is vLLM's extension of the OpenAI-compatible `/v1/completions`: `prompt` as lists of token ids and
`prompt_logprobs` k. Each choice answers with `prompt_logprobs`, for each position of the prompt a mapping from token id
to `logprob`, `rank` and `decoded_token`: the k likeliest, and the token that stands there. The first position has none.
vLLM gives at most 20 unless it is started with `--max-logprobs`; they are over the whole vocabulary and not tempered.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from opsd.config import Config
from opsd.errors import ConfigError, brief, one_line
from opsd.prompts import Example
from opsd.recipes.base import columns
from opsd.recipes.batch import TopK
from opsd.rollouts import Rollout
from opsd.top_k import TopKTeacher
from opsd.vocabulary import gaps_of
from opsd_kernels import Head

KEY = "OPSD_TEACHER_KEY"
"""The variable of the environment with the key of a server that wants one."""

ATTEMPTS, TIMEOUT = 3, 600.0  # seconds
SAMPLE = "The quick brown fox: 3 + 4 = 7, 12.5 % of {x};\n\tNaïve façade."


class ServedTeacher(TopKTeacher):
    """The model of the server at `teacher.path`, whatever it holds: its weights do not change with the student's.

    Raises:
        ConfigError: the server cannot be reached, has another tokenizer, or does not give `objective.top_k` tokens.
    """

    def __init__(self, config: Config, head: Head, tokenizer: Any, device: torch.device):
        path, k = config.teacher.path or "", config.objective.top_k or 1
        self.where = f"teacher.path {path!r}"
        if not path.startswith(("http://", "https://")):
            raise ConfigError(f"{self.where}; accepted with teacher.kind server: http://HOST:PORT")
        if k > columns(head):
            raise ConfigError(f"objective.top_k is {k}; accepted: 1 to {columns(head)}, the vocabulary")
        super().__init__(head, k, device)
        self.root = path.rstrip("/").removesuffix("/v1")
        models = self._ask("/v1/models")
        try:
            self.model = models["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.where} names no model at /v1/models: {brief(models, 100)}") from None
        self._check_tokenizer(tokenizer)
        ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"][:2]
        self._known([ids], [len(ids) - 1])

    def _check_tokenizer(self, tokenizer: Any) -> None:
        ours = list(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
        asked = {"model": self.model, "prompt": SAMPLE, "add_special_tokens": False}
        theirs = self._ask("/tokenize", asked).get("tokens")
        if theirs != ours:
            raise ConfigError(
                f"{self.where} has another tokenizer than the model: of {SAMPLE[:19]!r} ... it makes "
                f"{brief(theirs, 60)}, not {brief(ours, 60)}"
            )

    def top_k(self, examples: Sequence[Example], rollouts: Sequence[Rollout]) -> TopK:
        sequences = [[*e.teacher, *r.ids] for e, r in zip(examples, rollouts, strict=True)]
        ids, logprobs = self._known(sequences, [len(rollout.ids) for rollout in rollouts])
        return TopK(torch.tensor(ids, device=self.device), torch.tensor(logprobs, device=self.device))

    def _known(self, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> tuple[list[Any], list[Any]]:
        """The likeliest tokens at the last `counts` positions of each sequence, and their log-probabilities."""
        asked = {"model": self.model, "prompt": [list(ids) for ids in sequences], "prompt_logprobs": self.k}
        answer = self._ask("/v1/completions", {**asked, "max_tokens": 1, "temperature": 0})
        choices = sorted(answer.get("choices") or [], key=lambda choice: choice.get("index", 0))
        if len(choices) != len(sequences):
            raise ConfigError(f"{self.where} answered {len(choices)} of {len(sequences)} prompts")
        ids, logprobs = [], []
        for choice, sequence, count in zip(choices, sequences, counts, strict=True):
            positions = choice.get("prompt_logprobs") or []
            if len(positions) != len(sequence):
                raise ConfigError(f"{self.where} gave {len(positions)} prompt_logprobs for {len(sequence)} tokens")
            for token, found in list(zip(sequence, positions, strict=True))[len(sequence) - count :]:
                top = self._top(token, found)
                ids.append([token for token, _ in top])
                logprobs.append([logprob for _, logprob in top])
        return ids, logprobs

    def _top(self, token: int, found: Any) -> list[tuple[int, float]]:
        """The k likeliest of a position, of which the server tells k and the token that stands there."""
        if not isinstance(found, Mapping) or str(token) not in found:
            raise ConfigError(f"{self.where} says nothing of token {token} where it stands: another tokenizer?")
        pairs = sorted(((int(i), float(one["logprob"])) for i, one in found.items()), key=lambda pair: -pair[1])
        if len(pairs) < self.k:
            raise ConfigError(f"objective.top_k is {self.k}, {self.where} gave {len(pairs)} tokens at a position")
        top = pairs[: self.k]
        tokens, gaps = range(columns(self.head)), gaps_of(self.head)
        good = all(i in tokens and i not in gaps and logprob <= 1e-3 for i, logprob in top)
        if not good or sum(math.exp(logprob) for _, logprob in top) > 1.01:
            raise ConfigError(f"{self.where} gave no log-probabilities of the model's vocabulary: {brief(top, 100)}")
        return top

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that the server answers, asked again where the connection fails."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urlopen(Request(self.root + path, data, headers), timeout=TIMEOUT) as response:
                    return json.load(response)
            except HTTPError as error:  # it was understood, and refused
                said = brief(error.read().decode(errors="replace"), 300)
                hint = "; vLLM gives more with --max-logprobs" if "logprobs" in said else ""
                raise ConfigError(f"{self.where}{path}: {error.code} {error.reason}: {said}{hint}") from error
            except (URLError, OSError, ValueError) as error:
                if attempt == ATTEMPTS:
                    raise ConfigError(f"{self.where}{path}: no answer: {one_line(error)}") from error
                time.sleep(attempt)
