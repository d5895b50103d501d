"""Which kind of run a configuration asks for."""

from __future__ import annotations

from classfair.training.config import TrainConfig
from classfair.training.engine import Run
from classfair.training.jtt import TwiceTrainedRun
from classfair.training.lff import TwoModelRun
from classfair.training.second_stage import SecondStageRun


def run_type(config: TrainConfig) -> type[Run]:
    """The configuration has made sure that these exclude each other."""
    if config.stage2 != "none":
        return SecondStageRun
    return {"lff": TwoModelRun, "jtt": TwiceTrainedRun}.get(config.method, Run)
