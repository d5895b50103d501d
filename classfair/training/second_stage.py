"""A second stage on fixed features: the classifier anew (cRT), a scale for each class (LWS), norms evened out (tau)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

import classfair
from classfair.nn import ScaledLinear, WithFeatures, replace_head
from classfair.nn.features import _find_head
from classfair.priors import tau_normalize
from classfair.training.batches import Draw, TrainingOrder, derived_seed
from classfair.training.config import TrainConfig
from classfair.training.engine import Batch
from classfair.training.staged import StagedRun
from classfair.training.totals import Totals


class SecondStageRun(StagedRun):
    """Features from the first stage, by whatever loss; then plain cross-entropy on class-balanced batches.

    Features stay as they are: dropout is off, and batch norm uses and keeps its running averages. The learning rate
    starts again. With tau-norm nothing is trained: one pass over the training images takes their statistics.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.switch = self.config.epochs
        head = _find_head(self._plain)
        if self.config.stage2 == "crt" and not hasattr(head, "reset_parameters"):
            raise ValueError(f"expected stage2 crt with a classifier that can be drawn anew, got {type(head).__name__}")

    @property
    def _plain(self) -> nn.Module:
        return self.model._model if isinstance(self.model, WithFeatures) else self.model

    @property
    def _trains(self) -> bool:
        return self.config.stage2 != "tau-norm"

    @property
    def _second(self) -> bool:
        return self.stage_start > 0

    def begin_second(self, *, restored: bool) -> TrainConfig:
        self.model = self._plain
        self.model.requires_grad_(False).zero_grad()  # an optimizer would step along gradients that are left
        self.criterion = classfair.CrossEntropyLoss(reduction="sum", label_smoothing=self.config.label_smoothing)
        self.criterion.to(self.device)
        torch.manual_seed(derived_seed(Draw.STAGE, self.seed))
        head: Any = _find_head(self.model)
        if self.config.stage2 == "crt":
            head.reset_parameters()
            head.requires_grad_(True)
        elif self.config.stage2 == "lws":
            replace_head(self.model, ScaledLinear)
        else:
            with torch.no_grad():
                head.weight.copy_(tau_normalize(head.weight, self.config.stage2_tau))
                if getattr(head, "bias", None) is not None:
                    head.bias.zero_()
        epochs = self.config.total_epochs - self.switch
        return replace(self.config, epochs=epochs, drw_start=0, lr_warmup_epochs=0)

    def _train_mode(self) -> None:
        super()._train_mode()
        if self._second:
            self.model.eval()

    def _order(self) -> TrainingOrder:
        if not (self._second and self._trains):
            return super()._order()
        config = replace(self.config, sampler="class-balanced")
        return TrainingOrder(self.data.train_targets, config, self.seed, self.epoch, self.processes)

    def _step(self, window: list[Batch], totals: Totals) -> None:
        if not self._second or self._trains:
            return super()._step(window, totals)
        with torch.no_grad():
            for images, target, group in window:
                loss, stats = self._loss(self._output(self.model, images), target, group, differentiable=False)
                totals.add(loss, self.criterion.total_weight(target), stats)
        return self.optimizer.step()  # of nothing: the learning rate's schedule warns of an optimizer that stands still
