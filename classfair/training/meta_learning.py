"""Bilevel MetaLAD in a run: its meta set, the updates of omega, and what they leave in the run folder."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

import classfair
from classfair._names import say
from classfair.data import balanced_subset
from classfair.losses.metalad import TERMS
from classfair.training.batches import Data, Draw, Request, TrainingOrder, derived_seed, ignored
from classfair.training.config import TrainConfig
from classfair.training.distributed import Processes
from classfair.training.run_folder import RunFolder


def meta_indices(config: TrainConfig, targets: Tensor, seed: int, names: list[str]) -> Tensor:
    """Training images that are the meta set; ValueError naming a class that has too few."""
    number = torch.bincount(targets, minlength=len(names))
    least = config.meta_per_class + (config.meta_from == "heldout")  # one to train on
    if bool((number < least).any()):
        c = int((number < least).nonzero()[0])
        raise ValueError(
            f"expected {least} training images or more of every class with meta_per_class {config.meta_per_class} from"
            f" {config.meta_from}, got {number[c]} of class {names[c]}"
        )
    return balanced_subset(targets, config.meta_per_class, seed=derived_seed(Draw.META, seed), num_classes=len(names))


class MetaOrder(Sampler[Request]):
    """Meta batches of one process for the steps of an epoch: the meta set over and over, each time in another order."""

    def __init__(
        self, num_images: int, steps: int, config: TrainConfig, seed: int, epoch: int, processes: Processes
    ) -> None:
        self._requests: list[Request] = []
        self.counts: list[bool] = []
        seed = derived_seed(Draw.META, seed)
        for number in count(epoch * steps):
            order = TrainingOrder(torch.zeros(num_images), config, seed, number, processes)
            self._requests += order
            self.counts += [order.counts(step, 0) for step in range(order.steps)]
            if len(self) >= steps:
                break
        del self._requests[steps:]

    def __iter__(self) -> Any:
        return iter(self._requests)

    def __len__(self) -> int:
        return len(self._requests)


class MetaLearning:
    """What a run with a meta set has besides its loss: the step of omega, and omega after every epoch."""

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        data: Data,
        config: TrainConfig,
        seed: int,
        processes: Processes,
    ) -> None:
        self.criterion, self.data, self.config = cast(classfair.MetaLADLoss, criterion), data, config
        self.seed, self.processes = seed, processes
        options: dict[str, Any] = {"meta_lr": config.meta_lr, "method": config.meta_method}
        self.step = classfair.MetaLADStep(
            model, self.criterion, optimizer, scaler=scaler if scaler.is_enabled() else None, **options
        )
        omega = self.criterion.omega
        self.history = torch.full((config.epochs, *omega.shape), torch.nan)
        self.refused = torch.zeros(config.epochs, dtype=torch.int64)
        self._epoch, self._said = 0, 0
        self._counts: list[bool] = []
        if config.meta_lr:
            self._try(omega.device)

    def _try(self, device: torch.device) -> None:
        """ValueError for a model that lacks what the method needs, before hours of training."""
        assert self.data.meta is not None
        batch = self.data.meta[0, [0, 1]]
        if isinstance(batch, Exception):
            raise batch
        images, target = (part.to(device) for part in batch)
        amp = self.config.amp
        try:
            with torch.autocast(device.type, getattr(torch, self.config.amp_dtype), enabled=amp):
                self.step.hypergradient(images, target, images, target)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(str(error).removeprefix("MetaLADStep: ").replace("method=", "meta_method ")) from None

    @torch.no_grad()
    def begin(self, epoch: int, steps: int) -> tuple[Dataset[Any], MetaOrder]:
        """What to take meta batches from in an epoch. Omega is 0, cross-entropy, until it starts."""
        self._epoch, omega = epoch, self.criterion.omega
        if epoch == self.config.meta_start:
            omega.copy_(omega.new_tensor(self.config.omega)[:, None].expand_as(omega))
        elif epoch < self.config.meta_start:
            omega.zero_()
        config = replace(self.config, sampler="shuffle")  # a meta set is balanced
        order = MetaOrder(self.data.num_meta, steps, config, self.seed, epoch, self.processes)
        self._counts = list(reversed(order.counts[:steps]))
        assert self.data.meta is not None
        return self.data.meta, order

    def update(self, batch: tuple[Any, ...], meta_batch: tuple[Any, ...]) -> None:
        """Before the real step; of images, target and groups each."""
        (images, target, _), (meta_images, meta_target, _) = batch, meta_batch
        counts = self._counts.pop()
        if self._epoch >= self.config.meta_start and self.config.meta_lr:
            device = self.criterion.omega.device
            images, meta_images = (x.to(device, non_blocking=True) for x in (images, meta_images))
            self.step.update_omega(images, target, meta_images, meta_target if counts else ignored(meta_target))
        if not self._counts:
            self.history[self._epoch] = self.criterion.omega.cpu()
            self.refused[self._epoch] = self.step.refused.cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step.state_dict(), "history": self.history, "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step.load_state_dict(state["step"])
        self.history.copy_(state["history"])
        self.refused.copy_(state["refused"])
        self._said = int(self.step.refused)

    def write(self, folder: RunFolder, name: str, epochs: int) -> None:
        """Omega over the epochs done, as a table and a chart."""
        refused = int(self.refused[epochs - 1])
        if refused > self._said:
            say(f"{name}: {refused} updates of omega refused, not finite: try a smaller --meta-lr")
            self._said = refused
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["epoch", "class", *TERMS, "refused"])
        for epoch in range(epochs):
            for c, weights in enumerate(self.history[epoch].T.tolist()):
                table.writerow([epoch + 1, c, *weights, int(self.refused[epoch])])
        folder.write(f"statistics/{name}-omega.csv", text.getvalue().encode())
        folder.write(f"{name}-omega.png", self._chart(epochs))

    def _chart(self, epochs: int) -> bytes:
        """PNG: each weight over the epochs, as means of many-, medium- and few-shot classes."""
        from matplotlib.figure import Figure

        number = classfair.class_counts(self.data.train_targets, len(self.data.class_names)).numpy()
        many, few = number > self.config.many_shot, number < self.config.few_shot
        parts = {"many-shot": many, "medium": ~(many | few), "few-shot": few}
        history = self.history[:epochs].numpy()  # (E, 3, C)
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels: Any = figure.subplots(1, len(TERMS), sharex=True)
        for k, (axes, term) in enumerate(zip(panels, TERMS, strict=True)):
            for (label, members), style in zip(parts.items(), ("-", "--", ":"), strict=True):
                if members.any():
                    axes.plot(np.arange(1, epochs + 1), history[:, k, members].mean(1), style, lw=2, label=label)
            axes.set_title(f"weight of {term}")
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        return png.getvalue()
