"""Learning from failure: a biased model learns what is easy, the other one what the first fails on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

import classfair
from classfair.methods.difficulty import RelativeDifficulty
from classfair.training.batches import Draw, Request, TrainingOrder, derived_seed
from classfair.training.distributed import parallel
from classfair.training.engine import Batch, Run
from classfair.training.models import build_model
from classfair.training.objective import build_lr_schedule, build_optimizer
from classfair.training.totals import Totals


class Pair(nn.Module):
    """Logits of two models for the same images."""

    def __init__(self, debiased: nn.Module, biased: nn.Module) -> None:
        super().__init__()
        self.debiased, self.biased = debiased, biased

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.debiased(images), self.biased(images)


class TwoModelRun(Run):
    """Both models of "learning from failure", trained on the same batches; the debiased one is reported.

    The biased model has generalised cross-entropy as its loss, the debiased one cross-entropy with the weights of
    :class:`classfair.RelativeDifficulty`, divided by the number of images. One optimizer has the parameters of both.
    Source: Nam et al. 2020.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        classes = len(self.data.class_names)
        biased = build_model(self.config, classes, derived_seed(Draw.BIASED, self.seed) % 2**63).to(self.device)
        self.pair = Pair(self.model, biased)
        self.difficulty = RelativeDifficulty(self.data.train_targets, classes).to(self.device)
        self.optimizer = build_optimizer(self.pair, self.config)
        self.lr_schedule = build_lr_schedule(self.optimizer, self.config)
        self.net = parallel(self.pair, self.config, self.device, self.processes)
        self._each = classfair.CrossEntropyLoss(reduction="none", label_smoothing=self.config.label_smoothing)
        self._each.to(self.device)
        self._indices: deque[list[int]] = deque()  # of the batches that were handed out and have not been trained on

    def _train_mode(self) -> None:
        super()._train_mode()
        self.pair.train()

    def _batches(self, dataset: Dataset[Any], order: Sampler[Request], groups: Tensor | None) -> Iterator[Batch]:
        if not isinstance(order, TrainingOrder):
            yield from super()._batches(dataset, order, groups)
            return
        self._indices.clear()
        for (_, indices), batch in zip(order, super()._batches(dataset, order, groups), strict=True):
            self._indices.append(indices)
            yield batch

    def _step(self, window: list[Batch], totals: Totals) -> None:
        weights = [self._each.total_weight(target) for _, target, _ in window]
        total = self.processes.sum_(torch.stack(weights).sum())
        share = torch.where(total > 0, self.processes.world / total, 0.0)
        self.optimizer.zero_grad()
        for i, (batch, weight) in enumerate(zip(window, weights, strict=True)):
            with self._no_sync(wait=i + 1 < len(window)):
                objective, loss, stats = self._losses(batch, self._indices.popleft())
                self.scaler.scale(objective * share).backward()
            totals.add(loss, weight, stats)
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            for model in (self.pair.debiased, self.pair.biased):
                nn.utils.clip_grad_norm_(model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _losses(self, batch: Batch, indices: list[int]) -> tuple[Tensor, Tensor, classfair.BatchStats]:
        """What both models are trained on, summed, and the plain loss and statistics of the debiased one."""
        images, target, group = batch
        options: dict[str, Any] = {} if group is None else {"group": group, "num_groups": self.num_groups}
        with self._autocast():
            logits, biased = self.net(images.to(self.device, non_blocking=True))
        each, stats = self._each.with_stats(logits, target, differentiable=False, **options)
        index = torch.tensor(indices, device=self.device).where(target >= 0, -1)
        with torch.no_grad():
            of_biased = self._each(biased, target)
        weight = self.difficulty.update(index, of_biased, each.detach())
        easy = classfair.generalized_cross_entropy(biased, target, reduction="sum")
        return (weight * each).sum() + easy, each.detach().sum(), stats

    def _parts(self) -> dict[str, Any]:
        return {**super()._parts(), "biased": self.pair.biased, "difficulty": self.difficulty}
