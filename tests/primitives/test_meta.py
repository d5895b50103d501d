"""The conformance suite can fail: every output of a kernel, corrupted, is caught."""

import pytest
import torch

from classfair import backends
from tests.support.cases import CASES
from tests.support.conformance import Corrupt, check_case

CASE = next(c for c in CASES if c.id == "all")
FORWARD = {"loss": 0, "lse": 1, "lse_raw": 2, "prediction": 3, "mass": 4, "hit": 5, "joint": 6, "counts": 7}
BACKWARD = {"grad_logits": 0, "grad_offset": 1, "grad_margin": 2, "grad_pair": 3}


def _off(value):
    return value + (1e-4 if value.is_floating_point() else 1)


def _unwritten(value):
    return value * torch.nan if value.is_floating_point() else value + 10**9


@pytest.mark.skipif("native" not in backends.available("softmax_loss", "cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize("fill", [_off, _unwritten])
@pytest.mark.parametrize(
    ("operator", "output"),
    [("softmax_loss_fwd", n) for n in (*FORWARD, "total_weight")] + [("softmax_loss_bwd", n) for n in BACKWARD],
)
def test_a_corrupted_output_is_caught(monkeypatch, operator, output, fill):
    check_case(CASE, "native", "cpu", torch.float32)
    index = {**FORWARD, **BACKWARD, "total_weight": 8}[output]
    real = backends.namespace
    monkeypatch.setattr(backends, "namespace", lambda name: Corrupt(real(name), operator, index, fill))
    with pytest.raises(AssertionError):
        check_case(CASE, "native", "cpu", torch.float32)
