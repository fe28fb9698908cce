"""Recipes: what on-policy self-distillation minimises. One class for each, found by its name. Needs torch alone."""

from dataclasses import fields
from typing import Any

from .batch import Recipe, Stream, TokenBatch
from .divergence import FullDivergence
from .sampled_token import SampledToken

__all__ = ["RECIPES", "Recipe", "Stream", "TokenBatch", "make", "names"]

RECIPES: dict[str, Any] = {"full": FullDivergence, "sampled_token": SampledToken}


def names() -> list[str]:
    """Every recipe, sorted."""
    return sorted(RECIPES)


def make(name: str, **options: Any) -> Recipe:
    """The recipe `name` with these options, the others at their defaults.

    Raises:
        ValueError: there is no such recipe, or it has no such option; the message says what there is.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; accepted: {', '.join(names())}")
    known = [option.name for option in fields(RECIPES[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"recipe {name} has no option {option!r}; accepted: {', '.join(known)}")
    return RECIPES[name](**options)
