"""The speed regression check: its statistics, its choice of a commit, and that its steps suit any commit."""

import ast
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import classfair
from benchmarks import check, commit, machine


def test_interval_of_ten_ratios_is_between_the_second_from_either_end():
    ratios = [1.3, 0.9, 1.1, 1.0, 1.2, 0.8, 1.7, 1.4, 1.6, 1.5]
    assert check.median_ratio(ratios) == (pytest.approx(1.25), 0.9, 1.6)


@pytest.mark.parametrize(("pairs", "coverage"), [(6, 0.969), (10, 0.979), (15, 0.965)])
def test_interval_holds_the_median_as_often_as_it_claims(pairs, coverage):
    """Of a skewed distribution with median 1, whatever that is. The deviation of a share of 20000 is 0.0013."""
    draw = random.Random(0)
    intervals = [check.median_ratio([draw.expovariate(0.6931472) for _ in range(pairs)]) for _ in range(20000)]
    assert sum(i.low <= 1 <= i.high for i in intervals) / 20000 == pytest.approx(coverage, abs=0.004)


def test_too_few_ratios_have_no_interval():
    with pytest.raises(ValueError, match=r"median_ratio: expected enough ratios for a confidence of 0\.95, got 5"):
        check.median_ratio([1.0] * 5)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.1] * 10, "SLOWER"),
        ([1.1] * 9 + [0.5], "SLOWER"),  # one pair may go astray
        ([1.1] * 8 + [0.9] * 2, "noisy"),
        ([1.0] * 9 + [3.0], ""),
        ([1.04] * 10, ""),
        ([0.9] * 10, "faster"),
    ],
)
def test_verdict(ratios, expected):
    assert check.verdict(check.median_ratio(ratios)) == expected


def test_report_names_what_is_slower_and_what_fails(capsys):
    base = {"same": 1.0, "slow": 1.0, "lost": 1.0}
    here = {"same": 1.0, "slow": 1.1, "new": 1.0}
    assert check.report([(base, here)] * 10) == ["slow", "lost"]
    said = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert said == {"same": "1.000", "slow": "SLOWER", "lost": "FAILS", "new": "new"}


def test_another_classfair_is_not_measured(tmp_path):
    step = {"param": "plain", "extra_info": {"package": "/elsewhere/classfair"}, "stats": {"min": 0.5}}
    (tmp_path / "times.json").write_text(json.dumps({"benchmarks": [step]}))
    side = check.Side(Path("python"), Path("/elsewhere"))
    assert check.least_times(side, tmp_path, status=0) == {"plain": 0.5}
    with pytest.raises(SystemExit, match="expected classfair in /here, got /elsewhere/classfair"):
        check.least_times(side._replace(package=Path("/here")), tmp_path, status=0)


def test_a_process_that_fails_shows_its_output(tmp_path):
    (tmp_path / "output").write_text("no such module")
    with pytest.raises(SystemExit, match="the measuring process failed:\nno such module"):
        check.least_times(check.Side(Path("python"), tmp_path), tmp_path, status=2)


@pytest.mark.slow
def test_a_pair_of_processes_measures_a_step():
    side = check.Side(Path(sys.executable), Path(classfair.__file__).parent)
    first, second = check.measure_pair(side, side, ["plain (8,1000) both"])
    assert first.keys() == second.keys() == {"plain (8,1000) both"}
    assert 0 < min(first.values()) < 1


def test_base_is_where_the_branch_left_the_main_one(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "ROOT", tmp_path)

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=tmp_path, check=True)

    git("init", "-q", "-b", "main")
    with pytest.raises(SystemExit, match="expected a branch main or origin/main, got none; name a commit: BASE="):
        commit.resolve(None)
    for name in ("first", "second"):
        git("commit", "-q", "--allow-empty", "-m", name)
    assert commit.resolve(None) == commit.git("rev-parse", "main^")  # on the main branch: its last commit but one
    git("checkout", "-q", "-b", "branch")
    git("commit", "-q", "--allow-empty", "-m", "third")
    assert commit.resolve(None) == commit.git("rev-parse", "main")
    assert commit.resolve("main^") == commit.git("rev-parse", "main^")
    with pytest.raises(SystemExit, match="git rev-parse --verify nowhere"):
        commit.resolve("nowhere")


def test_steps_use_public_names_alone():
    """Any commit must know them, and only its own classfair may run."""
    tree = ast.parse(check.STEPS.read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    modules = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
    modules |= {f"{'.' * n.level}{n.module or ''}" for n in imports if isinstance(n, ast.ImportFrom)}
    assert {m for m in modules if "classfair" in m or m.startswith((".", "benchmarks"))} == {"classfair"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "classfair"}
    assert used - {"__file__"} <= set(classfair.__all__)


def test_results_tell_processors_of_one_name_apart():
    text = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
        "stepping\t: 1\nflags\t\t: fpu avx avx2 avx512f\n\nprocessor\t: 1\nmodel name\t: other\n"
    )
    found = machine.processor(text)
    numbers = {"family": 25, "model": 17, "stepping": 1}
    assert found == {"name": "AMD EPYC", "vendor": "AuthenticAMD", **numbers, "vectors": "avx2 avx512f"}
    assert machine.slug(found) == "amd-epyc-25-17"
