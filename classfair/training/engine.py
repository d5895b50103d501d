"""One training run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

import classfair
from classfair._names import say
from classfair.nn import WithFeatures, with_features
from classfair.training import interruption
from classfair.training.batches import (
    Data,
    Draw,
    EvaluationOrder,
    Request,
    TrainingOrder,
    counted,
    derived_seed,
    ignored,
    loader,
)
from classfair.training.config import FEATURE_LOSSES, TrainConfig
from classfair.training.distributed import Processes, local_device, parallel
from classfair.training.group_measures import NEED_JOINT, penalty
from classfair.training.group_table import NO_GROUP, check_same_groups, group_state
from classfair.training.image_folder import BadImageError
from classfair.training.meta_learning import MetaLearning
from classfair.training.models import build_model
from classfair.training.objective import (
    build_criterion,
    build_lr_schedule,
    build_optimizer,
    build_schedules,
    read_effective_counts,
)
from classfair.training.run_folder import CHECKPOINT_VERSION
from classfair.training.saved import check_state
from classfair.training.totals import Epoch, RunResult, Totals

#: Images, their target and their groups if they have any.
Batch = tuple[Tensor, Any, Tensor | None]


class DeviceUnavailableError(RuntimeError):
    """The requested device exists in PyTorch but not on this machine."""


def resolve_device(name: str) -> torch.device:
    """The device of that name, after checking that it works here; ``auto`` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = local_device(torch.device(name))
    except RuntimeError:
        raise ValueError(f"expected device to be auto, cpu, cuda or cuda:N, got {name}") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise DeviceUnavailableError(f"expected a device of this machine, got {name}") from None
    return device


class Run:
    """One loss with one seed: everything that a checkpoint holds.

    Random numbers come from seeds derived from (seed, epoch) and, where processes must differ, the process: so runs
    that differ only in the loss are paired, and an interrupted run has no random state to lose.
    """

    def __init__(
        self, loss: str, seed: int, data: Data, config: TrainConfig, device: torch.device, processes: Processes
    ) -> None:
        self.loss, self.seed, self.data, self.config = loss, seed, data, config
        self.device, self.processes = device, processes
        num_classes = len(data.class_names)
        counts = classfair.class_counts(data.train_targets, num_classes)
        effective = None
        if config.effective_frequency:
            effective = read_effective_counts(Path(config.effective_frequency), loss, seed, data.class_names)
        self.model: nn.Module = build_model(config, num_classes, seed, loss)
        feature_dim = 0
        if loss in FEATURE_LOSSES:
            self.model = with_features(self.model)
            feature_dim = cast(Tensor, self.model.head.weight).shape[1]
        self.model.to(device)
        self.criterion = build_criterion(loss, config, counts, effective, feature_dim).to(device)
        self.optimizer = build_optimizer(self.model, config)
        self.lr_schedule = build_lr_schedule(self.optimizer, config)
        self.schedules = build_schedules(self.criterion, config, counts)
        scaled = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.counts = counts
        self.group_names = [] if data.groups is None else data.groups.names
        # One more for images without a group, where there are any.
        self.num_groups = 0 if data.groups is None else len(self.group_names) + data.groups.incomplete
        self.epoch = 0  # epochs done
        self.stage_start = 0  # epochs done when the present stage, its optimizer and schedule, began
        self.train_loss: list[float] = []
        self.train: Totals | None = None
        self.val: Totals | None = None
        self.net = parallel(self.model, config, device, processes)
        self.meta: MetaLearning | None = None
        if loss == "metalad" and data.meta is not None:
            parts = (self.model, self.criterion, self.optimizer, self.scaler)
            self.meta = MetaLearning(*parts, data, config, seed, processes)

    def _train_mode(self) -> None:
        self.model.train()
        self.criterion.train()

    def _order(self) -> TrainingOrder:
        """The training images of this epoch."""
        return TrainingOrder(self.data.train_targets, self.config, self.seed, self.epoch, self.processes)

    def train_epoch(self) -> Totals:
        """Statistics of one pass over the training images, taken from the pass itself."""
        self._train_mode()
        # Dropout differs between processes; the generator of workers is fixed because images seed themselves.
        torch.manual_seed(derived_seed(Draw.DROPOUT, self.seed, self.epoch, self.processes.rank))
        totals = self._totals(joint=False)
        order = self._order()
        groups = None if self.data.groups is None else self.data.groups.train
        batches = self._batches(self.data.train, order, groups)
        meta = None if self.meta is None else self._batches(*self.meta.begin(self.epoch, order.steps), None)
        for step in range(order.steps):
            window = []
            for part in range(self.config.grad_accum):
                images, target, group = next(batches)
                window.append((images, target if order.counts(step, part) else ignored(target), group))
            if self.meta is not None and meta is not None:
                with self._autocast():
                    self.meta.update(window[0], next(meta))
            self._step(window, totals)
        return self._merged(totals, "training")

    def _totals(self, *, joint: bool) -> Totals:
        named = len(self.group_names)
        return Totals(len(self.data.class_names), self.device, self.num_groups, joint=joint, named=named)

    def _step(self, window: list[Batch], totals: Totals) -> None:
        """One optimiser step: the mean loss over all images of all forward passes and processes.

        A penalty is of what all processes see in one forward pass, and its mean over the passes is added.
        """
        fairness, alpha = self.config.fairness, self.config.zero_uniformity
        weights = [self.criterion.total_weight(target) for _, target, _ in window]
        total = self.processes.sum_(torch.stack(weights).sum())
        # DDP averages over processes: undo that. Nothing to learn from is a gradient of 0.
        share = torch.where(total > 0, self.processes.world / total, 0.0)
        self.optimizer.zero_grad()
        for i, ((images, target, group), weight) in enumerate(zip(window, weights, strict=True)):
            with self._no_sync(wait=i + 1 < len(window)):
                options: dict[str, Any] = {"differentiable": fairness != "none", "joint": fairness in NEED_JOINT}
                output = self._output(self.net, images)
                if alpha:
                    output, response = output
                loss, stats = self._loss(output, target, group, **options)
                objective = loss * share
                if alpha:  # DDP averages what the processes' own probes say
                    logits = response[-1] if isinstance(response, tuple) else response
                    objective = objective + alpha / len(window) * classfair.zero_uniformity_loss(logits)
                if fairness != "none":  # every process has the penalty of all: DDP's average is that penalty once
                    unfairness = penalty(fairness, stats, len(self.group_names))
                    objective = objective + self.config.fairness_weight / len(window) * unfairness
                self.scaler.scale(objective).backward()
            totals.add(loss, weight, stats)
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _output(self, net: nn.Module, images: Tensor) -> Any:
        with self._autocast():
            return net(images.to(self.device, non_blocking=True))

    def _loss(
        self, output: Any, target: Any, group: Tensor | None, **options: Any
    ) -> tuple[Tensor, classfair.BatchStats]:
        if group is not None:
            options |= {"group": group, "num_groups": self.num_groups}
        if not isinstance(self.model, WithFeatures):
            return self.criterion.with_stats(output, target, **options)
        features, logits = output  # (B, D), (B, C)
        head, criterion = self.model.head, cast(Any, self.criterion)
        given = head if isinstance(criterion, classfair.EstimatedOffsetLoss) else head.weight
        return criterion.with_stats(features, given, target, logits=logits, **options)

    @torch.no_grad()
    def evaluate(self) -> Totals:
        """Statistics of the validation images, every one exactly once over all processes."""
        # Running averages of batch norm differ between processes; those of the main one are in the checkpoint.
        self.processes.broadcast_(self.model.buffers())
        self.model.eval()
        self.criterion.eval()
        totals = self._totals(joint=True)
        order = EvaluationOrder(self.data.num_val, self.config.val_batch_size, self.processes)
        groups = None if self.data.groups is None else self.data.groups.val
        lost = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, target, group in self._batches(self.data.val, order, groups):
            output = self._output(self.model, images)
            loss, stats = self._loss(output, target, group, joint=totals.joint is not None)
            every = counted(stats, target, group)
            lost += (every - stats.count).sum()
            totals.add(loss, every.sum(), replace(stats, count=every))  # without finite logits: a wrong prediction
        if (number := int(self.processes.sum_(lost))) and self.processes.is_main:
            say(f"{self.loss} seed {self.seed}, epoch {self.epoch}: {number} validation images without finite logits")
        return self._merged(totals, "validation")

    def _merged(self, totals: Totals, part: str) -> Totals:
        totals.merge(self.processes)
        if not totals.count.any() and totals.loss.isfinite().all():
            raise BadImageError(f"expected {part} images that can be read, got none")
        return totals

    def _batches(self, dataset: Dataset[Any], order: Sampler[Request], groups: Tensor | None) -> Iterator[Batch]:
        """Images where they were loaded, the rest on the device: weights of targets come before the first forward pass.

        The loader, which iterates over the order too, keeps it: so groups need not pass through data sets.
        """
        for (_, indices), batch in zip(order, loader(dataset, order, self.config, self.device), strict=True):
            interruption.check()
            if isinstance(batch, Exception):
                raise batch
            images, target = batch
            if isinstance(target, Tensor):
                target = target.to(self.device, non_blocking=True)
            else:
                target = type(target)(*(part.to(self.device, non_blocking=True) for part in target))
            group = None
            if groups is not None:
                group = groups[indices]
                group = torch.where(group == NO_GROUP, len(self.group_names), group)
                group = group.to(self.device, non_blocking=True)
            yield images, target, group

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = getattr(torch, self.config.amp_dtype)
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp)

    def _no_sync(self, *, wait: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all but the last forward pass of a step wait for it before they are averaged."""
        net: Any = self.net
        return net.no_sync() if wait and self.processes.world > 1 else contextlib.nullcontext()

    def next_epoch(self) -> Epoch:
        """Train for one epoch and evaluate."""
        lr = self.optimizer.param_groups[0]["lr"]
        self.train = self.train_epoch()
        train_loss = self.train.mean_loss
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f"expected finite {self.loss} loss, got {train_loss} in epoch {self.epoch + 1}: try a smaller lr"
            )
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise FloatingPointError(
                f"expected finite weights after epoch {self.epoch + 1} of {self.loss}, got nan or inf: try a smaller lr"
            )
        for schedule in (self.lr_schedule, *self.schedules):
            schedule.step()
        self.epoch += 1
        self.train_loss.append(train_loss)
        self.val = self.evaluate()
        return Epoch(self.loss, self.seed, self.epoch, self.train, self.val, lr, self.group_names)

    def result(self) -> RunResult:
        assert self.train is not None
        assert self.val is not None
        count = self.counts.numpy()
        return RunResult(
            self.loss,
            self.seed,
            self.data.class_names,
            count,
            self.train,
            self.val,
            list(self.train_loss),
            self.group_names,
        )

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "criterion": self.criterion, "optimizer": self.optimizer}
        parts |= {"lr_schedule": self.lr_schedule, "scaler": self.scaler}
        parts |= {} if self.meta is None else {"meta": self.meta}
        return parts | {f"schedule{i}": schedule for i, schedule in enumerate(self.schedules)}

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: tensors and plain values only."""
        assert self.train is not None
        assert self.val is not None
        return {
            "format_version": CHECKPOINT_VERSION,
            "loss": self.loss,
            "seed": self.seed,
            "epoch": self.epoch,
            "config": self.config.as_dict(),
            "class_names": self.data.class_names,
            **group_state(self.data.groups),
            **({} if self.data.images is None else {"images": self.data.images.digests}),
            "train_loss": self.train_loss,
            "train": self.train.state_dict(),
            "val": self.val.state_dict(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stands; ValueError if it is that of another job."""
        if state.get("class_names") != self.data.class_names:
            raise ValueError("expected a checkpoint with the classes of the data, got other classes")
        check_same_groups(self.data.groups, state)
        tables = {"train": self._totals(joint=False), "val": self._totals(joint=True)}
        check_state(state, self.config, self._parts(), tables, self.stage_start)
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"expected a checkpoint of model {self.config.model}, got another one ({reason})"
            ) from None
        self.epoch, self.train_loss = state["epoch"], list(state["train_loss"])
        self.train, self.val = Totals.from_state(state["train"]), Totals.from_state(state["val"])
