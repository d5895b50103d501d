"""Just train twice: a second model sees more often what a first one got wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from classfair.data import UpweightedSampler
from classfair.training.batches import EvaluationOrder, TrainingOrder
from classfair.training.config import TrainConfig
from classfair.training.models import build_model
from classfair.training.objective import build_lr_schedule
from classfair.training.staged import StagedRun


class ErrorSet(nn.Module):
    """Which training images the first model gets wrong."""

    wrong: torch.Tensor  # (N,) bool

    def __init__(self, images: int) -> None:
        super().__init__()
        self.register_buffer("wrong", torch.zeros(images, dtype=torch.bool))


class TwiceTrainedRun(StagedRun):
    """A first model for some epochs, then one from the same initial weights, with the errors of the first repeated.

    Errors are those of the first model in evaluation mode, on training images as validation images are prepared.
    Source: Liu et al. 2021, "Just train twice: improving group robustness without training group information".
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.switch = self.config.jtt_epochs
        self.errors = ErrorSet(len(self.data.train_targets)).to(self.device)
        first = replace(self.config, epochs=self.switch, lr_warmup_epochs=0)
        self.lr_schedule = build_lr_schedule(self.optimizer, first)

    @torch.no_grad()
    def prepare_second(self) -> None:
        self.model.eval()
        self.processes.broadcast_(self.model.buffers())
        wrong = torch.zeros(self.errors.wrong.shape, dtype=torch.int64, device=self.device)
        order = EvaluationOrder(len(wrong), self.config.val_batch_size, self.processes)
        dataset = self.data.train if self.data.train_plain is None else self.data.train_plain
        batches = self._batches(dataset, order, None)
        for (_, indices), (images, target, _) in zip(order, batches, strict=True):
            with self._autocast():
                predicted = self.model(images.to(self.device, non_blocking=True)).argmax(1)
            missed = (predicted != target) & (target >= 0)  # an image that cannot be read is none
            wrong[torch.tensor(indices, device=self.device)] = missed.long()
        self.errors.wrong.copy_(self.processes.sum_(wrong) > 0)

    def begin_second(self, *, restored: bool) -> TrainConfig:
        config = replace(self.config, weights="") if restored else self.config
        self.model = build_model(config, len(self.data.class_names), self.seed).to(self.device)
        return self.config

    def _order(self) -> TrainingOrder:
        order = None
        if self.stage_start:
            repeated = UpweightedSampler(
                self.errors.wrong, self.errors.wrong, self.config.jtt_weight, seed=self.seed, num_replicas=1, rank=0
            )
            repeated.set_epoch(self.epoch)
            order = repeated.order()
        return TrainingOrder(self.data.train_targets, self.config, self.seed, self.epoch, self.processes, order)

    def _parts(self) -> dict[str, Any]:
        return {**super()._parts(), "errors": self.errors}
