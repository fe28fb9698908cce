"""The moment that chat templates take for now, so that a prompt is the same on every day of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from unittest import mock

from transformers.utils import chat_template_utils


@dataclass(frozen=True)
class _Stopped:
    """In place of the class `datetime`, of which transformers calls `now` alone."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment


@contextmanager
def template_date(template: Any, moment: datetime) -> Iterator[None]:
    """While open, `strftime_now` in a chat template gives `moment`; transformers takes no function for it."""
    if "strftime_now" not in str(template):
        yield
        return
    with mock.patch.object(chat_template_utils, "datetime", _Stopped(moment)):
        yield
