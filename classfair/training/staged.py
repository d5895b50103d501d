"""Runs that go on with something else after some epochs."""

from __future__ import annotations

from typing import Any

from classfair.training.config import TrainConfig
from classfair.training.distributed import parallel
from classfair.training.engine import Run
from classfair.training.objective import build_lr_schedule, build_optimizer
from classfair.training.totals import Epoch


class StagedRun(Run):
    """A run of two stages, each with its own optimizer and learning rates.

    Attributes:
        switch: epochs of the first stage.
    """

    switch: int

    def prepare_second(self) -> None:
        """What the second stage needs to know of the first one, before the first one's model is changed."""

    def begin_second(self, *, restored: bool) -> TrainConfig:
        """Set up the modules of the second stage; returns the options of its optimizer and learning rates.

        ``restored``: a checkpoint replaces all values.
        """
        raise NotImplementedError

    def next_epoch(self) -> Epoch:
        if self.epoch == self.switch:
            self.prepare_second()
            self._switch(restored=False)
        return super().next_epoch()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        epoch = state.get("epoch")
        if type(epoch) is int and epoch > self.switch:
            self._switch(restored=True)
        super().load_state_dict(state)

    def _switch(self, *, restored: bool) -> None:
        config = self.begin_second(restored=restored)
        self.stage_start = self.switch
        self.schedules = []
        self.optimizer = build_optimizer(self.model, config)
        self.lr_schedule = build_lr_schedule(self.optimizer, config)
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        self.net = parallel(self.model, config, self.device, self.processes) if trains else self.model
