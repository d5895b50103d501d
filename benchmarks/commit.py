"""Another commit of the project, built in an environment of its own that shares torch and all else with this one."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".bench"
MAIN_BRANCHES = ("main", "origin/main")


def git(*arguments: str) -> str:
    """What git prints; its own words where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench-check: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def resolve(base: str | None) -> str:
    """The full name of a commit; None: where this branch left the main one, or the last commit but one of that."""
    if base:
        return git("rev-parse", "--verify", f"{base}^{{commit}}")
    branches = git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/remotes").split()
    main = next((name for name in MAIN_BRANCHES if name in branches), None)
    if main is None:
        raise SystemExit(f"bench-check: expected a branch {' or '.join(MAIN_BRANCHES)}, got none; name a commit: BASE=")
    left = git("merge-base", "HEAD", main)
    return git("rev-parse", "HEAD^") if left == git("rev-parse", "HEAD") else left


def python_of(commit: str) -> Path:
    """The interpreter of the commit's environment, which is built once and kept in CACHE."""
    environment = CACHE / f"{commit[:12]}-{sys.implementation.cache_tag}"
    if not environment.exists():
        CACHE.mkdir(exist_ok=True)
        # Renamed when it is whole, so that an interrupted build leaves nothing that looks like an environment.
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as folder:
            _build(commit, Path(folder))
            os.replace(Path(folder) / "environment", environment)
    _share_packages(environment)
    return environment / "bin" / "python"


def _build(commit: str, folder: Path) -> None:
    """The commit's sources in ``folder/source``, installed in ``folder/environment``."""
    source, environment = folder / "source", folder / "environment"
    git("archive", "--format=tar", "-o", str(folder / "source.tar"), commit)
    shutil.unpack_archive(folder / "source.tar", source, filter="data")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    _share_packages(environment)
    # The bin folder has the ninja that compiles sources side by side.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    options = ["--disable-pip-version-check", "--ignore-installed", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, *options, str(source)],
        env={**os.environ, "PATH": path, "CLASSFAIR_CUDA": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"bench-check: commit {commit} does not build:\n{done.stdout}")


def _share_packages(environment: Path) -> None:
    """Name the package folders of this interpreter in the environment, behind its own.

    They are written at every run, because this interpreter may be another one than when the environment was built.
    """
    shared = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "shared.pth").write_text("\n".join(shared) + "\n")
