"""Recipes: what on-policy self-distillation minimises. One class for each, found by its name. Needs torch alone.

`make` gives a recipe for any trainer: `token_loss` of hidden states. `FORMS` are those of the training loop, which
reduce over a step themselves.
"""

from dataclasses import fields
from typing import Any

from . import advantage, mixtures, policy, verdict, vocabulary
from .base import TokenRecipe
from .batch import Recipe, TokenBatch
from .divergence import FullDivergence
from .sampled_token import SampledToken

__all__ = ["FORMS", "RECIPES", "Recipe", "TokenBatch", "TokenRecipe", "make", "names"]

FORMS: dict[str, Any] = {"full": FullDivergence, "sampled_token": SampledToken}
"""What `objective.form` of the training loop names."""

RECIPES: dict[str, type[TokenRecipe]] = {
    "act_guide": advantage.ActGuide,
    "anti_sd": advantage.AntiSD,
    "ar_opd": mixtures.AROPD,
    "cepo": advantage.CEPO,
    "cl_egrsd": advantage.CLEGRSD,
    "copd": policy.CoPD,
    "credit": policy.CREDIT,
    "d_opsd": vocabulary.DOPSD,
    "distil": vocabulary.DistIL,
    "edge_opd": mixtures.EDGE,
    "egrsd": advantage.EGRSD,
    "gkd": vocabulary.GKD,
    "lightning": policy.Lightning,
    "mad_opd": mixtures.MADOPD,
    "msd": vocabulary.MSD,
    "nca": mixtures.NCA,
    "npo": advantage.NPO,
    "omni_opd": advantage.OmniOPD,
    "opd_plus": policy.OPDPlus,
    "oprd": mixtures.OPRD,
    "opsd": vocabulary.OPSD,
    "pbsd": verdict.PBSD,
    "pi_play": vocabulary.PiPlay,
    "purified": mixtures.Purified,
    "rgsd": vocabulary.RGSD,
    "rlrt": advantage.RLRT,
    "rlsd": advantage.RLSD,
    "rock": vocabulary.Rock,
    "sdft": vocabulary.SDFT,
    "sdpo": vocabulary.SDPO,
    "spear": verdict.SPEAR,
    "ta_opd": policy.TAOPD,
    "tad": vocabulary.TAD,
    "temporal": advantage.Temporal,
    "vpd": vocabulary.VPD,
    "zppo": advantage.ZPPO,
}


def names() -> list[str]:
    """Every recipe, sorted."""
    return sorted(RECIPES)


def make(name: str, **options: Any) -> TokenRecipe:
    """The recipe `name` with these options, the others at their defaults.

    Raises:
        ValueError: there is no such recipe, it has no such option, or the option's value is out of range; the message
            says what there is.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; accepted: {', '.join(names())}")
    known = [option.name for option in fields(RECIPES[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"recipe {name} has no option {option!r}; accepted: {', '.join(known)}")
    return RECIPES[name](**options)
