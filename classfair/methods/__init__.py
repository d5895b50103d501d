"""Training procedures that are more than a loss."""

from classfair.methods.bilevel import MetaLADStep
from classfair.methods.difficulty import RelativeDifficulty

__all__ = ["MetaLADStep", "RelativeDifficulty"]
