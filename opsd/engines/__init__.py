"""Engines: what writes rollouts. One file for each; `opsd.run.Engine` says what one has to offer."""

from .generate import GenerateEngine

__all__ = ["GenerateEngine"]
