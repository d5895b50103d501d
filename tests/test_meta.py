"""The conformance suite can fail: every output of a kernel, corrupted, is caught."""

import pytest
import torch

from classfair import backends

from .cases import CASES
from .conformance import check_case

CASE = next(c for c in CASES if c.id == "all")
FORWARD = {"loss": 0, "lse": 1, "lse_raw": 2, "prediction": 3, "mass": 4, "hit": 5, "joint": 6, "counts": 7}
BACKWARD = {"grad_logits": 0, "grad_offset": 1, "grad_margin": 2, "grad_pair": 3}


class _Corrupt:
    """A back-end's namespace with the first element of one output of one operator slightly off, or left unwritten."""

    def __init__(self, inner, operator, output, fill):
        self.inner, self.operator, self.output, self.fill = inner, operator, output, fill

    def __getattr__(self, name):
        function = getattr(self.inner, name)
        if name != self.operator:
            return function

        def corrupted(*arguments):
            result = list(function(*arguments))
            wrong = result[self.output].clone()
            wrong.view(-1)[0] = self.fill(wrong.view(-1)[0])
            result[self.output] = wrong
            return tuple(result)

        return corrupted


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
    monkeypatch.setattr(backends, "namespace", lambda name: _Corrupt(real(name), operator, index, fill))
    with pytest.raises(AssertionError):
        check_case(CASE, "native", "cpu", torch.float32)
