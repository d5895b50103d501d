"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import classfair

MODULES = [
    m.name
    for m in pkgutil.walk_packages(classfair.__path__, "classfair.")
    if not m.name.rpartition(".")[2].startswith("_") and "kernels" not in m.name
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "classfair": classfair}
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("name", classfair.__all__)
def test_public_names_have_a_docstring_with_an_example(name):
    public = getattr(classfair, name)
    documentation = inspect.getdoc(public) or ""
    assert len(documentation) > 60
    if name != "JointRows":  # part of BatchStats, which has one
        assert ">>>" in documentation
