"""Every example in a docstring or a document runs, and every public name has one."""

import ast
import doctest
import importlib
import importlib.util
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


ROOT = Path(__file__).parents[2]
OPTIONAL = {
    "accelerate",
    "lightning",
    "timm",
    "torchmetrics",
    "torchvision",
}  # an import of anything else must not fail


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


def for_torchrun(block):
    """A script of several processes, which says so in its first line; tests/test_recipes.py runs those."""
    return block.startswith("#") and "torchrun" in block.partition("\n")[0]


def run_block(block, name="<document>"):
    """Its variables, or a skipped test if an optional package that it imports is not installed."""
    for node in ast.walk(ast.parse(block)):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for package in OPTIONAL & {module.partition(".")[0] for module in modules}:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"this example needs {package}, which is not installed")
    variables = {"__name__": "__main__"}
    exec(compile(block, name, "exec"), variables)
    return variables


BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for i, block in enumerate(python_blocks(path))
    if not for_torchrun(block)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_documents_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what it writes
    run_block(block)


def test_there_is_code_in_the_readme():
    assert len(python_blocks(ROOT / "README.md")) >= 2


def test_only_optional_packages_may_be_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="needs timm"):
        run_block("def f():\n    from timm.data import Mixup")
    with pytest.raises(ModuleNotFoundError):
        run_block("import no_such_package")
