"""The image files of one seed with their classes, wherever they were named, and what they must fulfil."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from classfair.training.scan import Sample, left_out_line


@dataclass(frozen=True)
class Samples:
    """Images of both sides.

    Attributes:
        names: of the classes, in the order of their labels.
        train, val: paths and labels.
        folders: where training and validation paths start; the same one where one was split.
        left_out: what is no image of a class or side, by reason.
    """

    names: list[str]
    train: list[Sample]
    val: list[Sample]
    folders: tuple[Path, Path]
    left_out: dict[str, list[str]]

    def check(self, allow_missing: bool) -> Samples:
        """ValueError unless every class has images on both sides; ``allow_missing`` excuses validation."""
        check_complete(self.train, self.names, f"training images of every class in {self.folders[0]}", self.why)
        if not allow_missing:
            hint = "; --allow-missing leaves such classes out of all means"
            check_complete(self.val, self.names, "validation images of every class", self.why, hint)
        return self

    @property
    def why(self) -> str:
        """What was left out, in brackets, or nothing."""
        line = left_out_line(self.left_out, self.folders[0])
        return f" (left out: {line})" if line else ""


def check_complete(samples: list[Sample], names: list[str], expected: str, why: str, hint: str = "") -> None:
    """ValueError that names the classes without an image."""
    present = {label for _, label in samples}
    if missing := [name for c, name in enumerate(names) if c not in present]:
        raise ValueError(f"expected {expected}, got none of {some(missing)}{why}{hint}")


def some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def split_samples(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """A stratified split by seed."""
    from sklearn.model_selection import train_test_split

    labels = [label for _, label in samples]
    try:
        train, val = train_test_split(samples, test_size=share, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(
            f"expected a split that leaves images of every class on both sides, got {share} ({error})"
        ) from None
    return train, val
