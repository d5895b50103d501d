"""The shape of the library: how long the path of a call is, who imports whom, and how long files are."""

import ast
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import classfair

ROOT = Path(__file__).parents[2]
PACKAGE = Path(classfair.__file__).parent


def files_entered(call):
    """Files of the library in which a call enters a function, after a first call."""
    call()
    entered = set()

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.add(frame.f_code.co_filename.removeprefix(f"{PACKAGE}/"))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return sorted(entered)


COUNTS = [5, 4, 3, 2, 1]


def test_the_path_of_a_logit_adjusted_loss():
    logits, target = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 5
    criterion = classfair.LogitAdjustedLoss(COUNTS)
    files = files_entered(lambda: criterion(logits, target))
    assert "functional.py" in files
    assert len(files) <= 5, files


def test_the_path_of_a_metalad_step():
    features, weight = torch.randn(8, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    target, criterion = torch.arange(8) % 5, classfair.MetaLADLoss(COUNTS, 6)
    files = files_entered(lambda: criterion(features, weight, target, logits=features @ weight.T))
    assert "losses/metalad.py" in files
    assert len(files) <= 10, files


def modules():
    """Names and files of all modules; classfair.kernels has a folder of its own in a checkout."""
    for path in sorted((*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"))):
        parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
        yield ".".join(("classfair", *parts)).removesuffix(".__init__"), path


MODULES = dict(modules())


def imported(name, *, lazily):
    """Modules of the library that a module imports: when it is imported itself, or also in functions."""
    tree, found = ast.parse(MODULES[name].read_text()), set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
            start = [".".join(package.split(".")[: 1 - node.level or None])] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            found.update(f"{source}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            if lazily or (not isinstance(child, functions) and not _for_types(child)):
                visit(child)

    visit(tree)
    return {m for f in found if (m := _module(f)) and m != name}


def _for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _module(name):
    """The longest prefix that is a module."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def family(name):
    """The package below classfair, or the module in it."""
    return name.split(".")[1] if "." in name else ""


def test_only_the_command_line_imports_training():
    allowed = {"cli", "__main__", "training"}
    found = {n for n in MODULES for m in imported(n, lazily=True) if family(m) == "training"}
    assert {n for n in found if family(n) not in allowed} == set()
    assert any(family(n) == "cli" for n in found), "what runs a training?"
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert "classfair.training" not in path.read_text(), path


def test_kernels_do_not_import_the_oracle():
    found = {(n, m) for n in MODULES if family(n) == "kernels" for m in imported(n, lazily=True)}
    assert found, "no kernels"
    assert not [(n, m) for n, m in found if family(m) == "reference"]


def test_packages_import_each_other_in_one_direction():
    """At module level; a name that a function imports when it is called is no circle."""
    edges = defaultdict(set)
    for name in MODULES:
        for other in imported(name, lazily=False):
            if family(name) and family(other) and family(name) != family(other):
                edges[family(name)].add(family(other))
    assert {"ops", "statistics", "losses"} <= edges.keys()
    while edges:
        leaves = {f for f, others in edges.items() if not others & edges.keys()}
        assert leaves, {f: sorted(others & edges.keys()) for f, others in edges.items()}
        for leaf in leaves:
            del edges[leaf]


def test_one_name_is_one_thing():
    """A primitive has its operator, its formula and its Triton kernels under one name; nothing else shares one."""
    primitives = {p.stem for p in (PACKAGE / "ops").glob("*.py")}
    rooms = {PACKAGE / "ops", PACKAGE / "reference", ROOT / "kernels"}
    where = defaultdict(list)
    for path in MODULES.values():
        if path.parent.name in primitives:
            continue  # the folder says whose it is
        if path.stem not in ("__init__", "__main__") and not (path.parent in rooms and path.stem in primitives):
            where[path.stem].append(str(path.relative_to(ROOT)))
    del where["base"]  # the base classes of a family
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


#: Files above 320 lines, and why.
LONG = {
    "classfair/fairness.py": "three public functions, most of it their docstrings",
    "classfair/training/engine.py": "the loop of a run, which is to be split",
    "classfair/training/config.py": "every option with its help",
}


@pytest.mark.parametrize("folder", ["classfair", "csrc", "kernels", "benchmarks"])
def test_files_are_short(folder):
    endings = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in endings]
    assert files
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lines.items() if n > (410 if name in LONG else 320)} == {}


def test_exceptions_are_still_needed():
    assert {name for name in LONG if len((ROOT / name).read_text().splitlines()) <= 320} == set()
