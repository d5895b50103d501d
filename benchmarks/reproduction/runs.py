"""Trainings that the claims of one seed share: ``classfair train`` in this process, without a run folder."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import classfair
from classfair.metrics import cumulative_false_positives
from classfair.nn import WithFeatures
from classfair.training import TrainConfig
from classfair.training.distributed import SINGLE
from classfair.training.engine import Run
from classfair.training.jobs import fit, prepare
from classfair.training.sources import load_data
from classfair.training.sweep import calibration_error

T = TypeVar("T")


def _printed_sign(run: Run) -> None:
    """In place of the distance term: the first one with the sign that eq. 30 prints."""
    width = head_of(run.model).weight.shape[1]
    run.criterion = classfair.MetaLADLoss(run.counts, width, terms=("proportion",), paper_sign=True, reduction="sum")


def _perturbed_outer(run: Run) -> None:
    """Omega learns from the perturbed loss, as eq. 35 prints."""
    assert run.meta is not None
    run.meta.step.outer = "perturbed"


#: Known mistakes of papers, for which the command has no option.
CHANGES: dict[str, Callable[[Run], None]] = {"printed-sign": _printed_sign, "perturbed": _perturbed_outer}


EARLY = 10  # epochs


class Trained:
    """A finished run and what is measured on it."""

    def __init__(self, run: Run, responses: list[float], early: nn.Module | None = None) -> None:
        self.run = run
        self.early = early  # the model after EARLY epochs
        self.responses = responses  # after each epoch, to an input of zeros
        self.result = run.result()
        self.columns = self.result.columns(run.config)

    def __getitem__(self, column: str) -> float:
        return self.columns[column]

    @property
    def counts(self) -> Tensor:
        return self.run.counts

    @property
    def head(self) -> Any:
        return head_of(self.run.model)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return _features(self.run.model, images)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        output = self.run.model.eval()(images)
        return output[-1] if isinstance(output, tuple) else output

    @property
    def penalties(self) -> dict[str, float]:
        """Of the probabilities of all validation images."""
        return self.result.val.by_group(self.result.groups)["penalties"]

    @cached_property
    def train_images(self) -> tuple[Tensor, Tensor]:
        return _all_of(self.run.data.train, len(self.run.data.train_targets))

    @cached_property
    def test_images(self) -> tuple[Tensor, Tensor]:
        return _all_of(self.run.data.val, self.run.data.num_val)

    @cached_property
    def moments(self) -> classfair.ClassMoments:
        """Of the features of the training images."""
        return self.moments_of(*self.train_images)

    @cached_property
    def early_moments(self) -> classfair.ClassMoments:
        """Of their features after EARLY epochs."""
        return self.moments_of(*self.train_images, model=self.early)

    @torch.no_grad()
    def moments_of(self, images: Tensor, target: Tensor, model: nn.Module | None = None) -> classfair.ClassMoments:
        features = _features(self.run.model if model is None else model, images)
        return classfair.class_moments(features, target, len(self.counts), covariance="diag")

    @property
    def false_positive_area(self) -> float:
        """Above 0: false positives go to frequent classes."""
        val = self.result.val
        return float(cumulative_false_positives(val.predicted, val.correct, self.result.train_count)[1])

    @property
    def calibration_error(self) -> float:
        images, target = self.test_images
        return calibration_error(self.logits(images), target)


def head_of(model: Any) -> Any:
    return model.head if isinstance(model, WithFeatures) else model[-1]


def _features(model: Any, images: Tensor) -> Tensor:
    model.eval()
    return model(images)[0] if isinstance(model, WithFeatures) else model[:-1](images)


def _all_of(dataset: Any, number: int) -> tuple[Tensor, Tensor]:
    return dataset[0, list(range(number))]


class Runs:
    """The runs of one seed, each trained once however many claims read it."""

    def __init__(self, seed: int, mnist: Path | None = None) -> None:
        self.seed, self.mnist = seed, mnist
        self._kept: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def __call__(self, data: str, loss: str = "ce", change: str = "", **options: Any) -> Trained:
        """``classfair train --data DATA --loss LOSS``; FloatingPointError where it diverges."""
        key = (data, loss, change, tuple(sorted(options.items())))
        return self.once(key, lambda: self._train(data, loss, change, options))

    def _train(self, data: str, loss: str, change: str, options: dict[str, Any]) -> Trained:
        place = f"{data}:{self.mnist}" if data.startswith("mnist") else data
        config = TrainConfig.for_data(place, loss=(loss,), seeds=1, device="cpu", **options)
        with torch.random.fork_rng([]):
            run = prepare(loss, self.seed, load_data(config, self.seed), config, torch.device("cpu"), SINGLE, None)
            if change:
                CHANGES[change](run)
            responses: list[float] = []
            early: list[nn.Module] = []
            nothing = torch.zeros(1, _inputs(run.model))

            @torch.no_grad()
            def listen(_: Any) -> None:
                if run.epoch == EARLY:
                    early.append(deepcopy(run.model))
                output = run.model(nothing)
                responses.append(
                    float(classfair.zero_uniformity_loss(output[-1] if isinstance(output, tuple) else output))
                )

            fit(run, None, listen)
        return Trained(run, responses, *early)


def _inputs(model: nn.Module) -> int:
    return next(m.in_features for m in model.modules() if isinstance(m, nn.Linear))


def spearman(a: Any, b: Any) -> float:
    """Rank correlation; ranks of equal values are in their order."""
    ranks = [np.asarray(torch.as_tensor(x).detach().double()).argsort(kind="stable").argsort() for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
