"""Every example in a docstring runs, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

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


ROOT = Path(__file__).parents[1]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_documents_runs(block):
    exec(compile(block, "<document>", "exec"), {})


def test_there_is_code_in_the_readme():
    assert len(BLOCKS) >= 2
