"""``classfair doctor`` tells the truth and fails when something is broken."""

import json

import pytest
import torch

from classfair import backends, doctor
from classfair.cli import main


def rows(report, **wanted):
    return [r for r in report["backends"] if all(r[k] == v for k, v in wanted.items())]


def test_healthy_here(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"]
    for primitive in backends.PRIMITIVES:
        assert rows(report, primitive=primitive, device="cpu", backend="reference")[0]["status"] == "ok"
        default = [r for r in rows(report, primitive=primitive, device="cpu") if r["detail"] == "default"]
        assert [r["backend"] for r in default] == [backends.choose(primitive, torch.device("cpu"), None)]


def test_text_names_every_backend(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (*backends.BACKENDS, *backends.PRIMITIVES, "versions", "torch", "healthy"):
        assert word in text


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    if "native" not in backends.available("softmax_loss", "cpu"):
        pytest.skip("no compiled CPU kernels")
    real = backends.namespace

    class Wrong:
        def __init__(self, inner):
            self.inner = inner

        def softmax_loss_fwd(self, *arguments):
            loss, *rest = self.inner.softmax_loss_fwd(*arguments)
            return (loss + 1, *rest)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(backends, "namespace", lambda name: Wrong(real(name)))
    assert main(["doctor"]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_a_module_that_does_not_load_is_broken(monkeypatch):
    monkeypatch.setitem(backends.load_errors, "_cuda", "built, but its import failed: undefined symbol")
    report = doctor.examine()
    assert not report["healthy"]
    assert "undefined symbol" in report["unloadable"]["_cuda"]


def test_bad_usage():
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--nonsense"])
    assert stop.value.code == 2
