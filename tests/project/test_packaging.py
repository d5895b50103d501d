"""What a stranger installs: built from an sdist, with and without a compiler."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked: whatever it lacks, the builds below miss."""
    out = tmp_path_factory.mktemp("sdist")
    source = out / "checkout"
    ignore = shutil.ignore_patterns(".git", "*.so", "build", "*.egg-info", ".venv", "runs", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", command], cwd=source, check=True, capture_output=True)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def build_wheel(source, out, **environment):
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", out, source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return result, list(Path(out).glob("*.whl"))


def run_installed(wheel, where, code):
    """Run code against the wheel's content alone, not the checkout."""
    with zipfile.ZipFile(wheel) as z:
        z.extractall(where)
    # An editable install would hand out the checkout's modules.
    isolate = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    return subprocess.run(
        [sys.executable, "-c", isolate + code],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(where)},
        capture_output=True,
        text=True,
    )


LOSS = "import torch, classfair; print(classfair.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1])).item())"


def test_an_sdist_holds_what_people_and_tools_read(sdist):
    for name in ("README.md", "docs/design.md", ".clang-format", "Makefile", "tests/conftest.py", "csrc/terms.h"):
        assert (sdist / name).is_file(), name


@pytest.mark.slow
def test_without_a_compiler_it_is_pure_python_and_says_so_once(sdist, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result, wheels = build_wheel(sdist, tmp_path / "out", PATH=str(empty), CXX="no-such-compiler")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (result.stdout + result.stderr).count("no C++ compiler found; installing pure Python") == 1
    with zipfile.ZipFile(wheels[0]) as z:
        names = z.namelist()
    assert not any(n.endswith(".so") for n in names)
    assert {f"classfair/kernels/{f}.py" for f in ("__init__", "softmax_loss/launch", "pair_terms/forward")} <= set(
        names
    )
    ran = run_installed(wheels[0], tmp_path / "site", LOSS)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().startswith("1.386")
    assert ran.stderr.count("no compiled CPU kernels") == 1


@pytest.mark.slow
def test_cuda_is_refused_loudly_where_it_was_asked_for(sdist, tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "c++").symlink_to(compiler)
    result, wheels = build_wheel(sdist, tmp_path / "out", PATH=str(tools), CLASSFAIR_CUDA="1")
    assert result.returncode != 0
    assert not wheels
    assert "expected nvcc on PATH because CLASSFAIR_CUDA=1, got none" in result.stdout + result.stderr
    result, _ = build_wheel(sdist, tmp_path / "out", CLASSFAIR_CUDA="yes")
    assert "expected CLASSFAIR_CUDA=auto|0|1, got 'yes'" in result.stdout + result.stderr


@pytest.mark.slow
def test_sdist_to_wheel_has_its_kernels(sdist, tmp_path):
    result, wheels = build_wheel(sdist, tmp_path / "out", CLASSFAIR_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    code = LOSS + "; from classfair import _C; print(_C.build_info()['compiler'])"
    ran = run_installed(wheels[0], tmp_path / "site", code)
    assert ran.returncode == 0, ran.stderr
    assert "1.386" in ran.stdout
    assert ran.stderr == ""


CLANG = next(
    (path for version in ("", *(f"-{v}" for v in range(30, 13, -1))) if (path := shutil.which("clang++" + version))),
    None,
)


@pytest.mark.slow
@pytest.mark.skipif(CLANG is None, reason="no clang++")
def test_kernels_that_clang_compiles_pass_the_suite(sdist, tmp_path):
    """The row code is written in vector extensions and target pragmas, which GCC and clang spell differently."""
    result, wheels = build_wheel(sdist, tmp_path / "out", CLASSFAIR_CUDA="0", CXX=CLANG)
    assert result.returncode == 0, result.stdout + result.stderr
    site = tmp_path / "site"
    code = "from classfair import _C; print(_C.build_info()['compiler'])"
    assert run_installed(wheels[0], site, code).stdout.startswith("clang")
    shutil.copytree(ROOT / "tests", site / "tests")
    arguments = ["-c", "/dev/null", "-q", "--noconftest", "-k", "native-cpu and values_and"]
    suite = str(site / "tests/primitives/test_conformance.py")
    ran = run_installed(wheels[0], site, f"import pytest; sys.exit(pytest.main({[*arguments, suite]!r}))")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_importing_needs_no_extra():
    """Only torch and numpy are dependencies: the rest is imported where it is used, and so is torch's compiler, which
    takes seconds."""
    code = (
        "import sys, torch; compiler = {'torch._dynamo', 'torch._inductor'} - set(sys.modules);"
        "import classfair, classfair.doctor, classfair.cli, classfair.metrics;"
        "extras = {'sklearn', 'matplotlib', 'rich', 'tyro', 'torchmetrics'};"
        "print(sorted((extras | compiler) & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
