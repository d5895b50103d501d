"""The CPU kernels that ``make sanitize-cpu`` builds, as ``classfair._C`` of this process.

``pytest -p tests.fuzz.sanitized`` runs tests on them, ``python -m tests.fuzz.sanitized SEED SECONDS`` random calls.
"""

import importlib.util
import sys
from pathlib import Path

BUILT = Path(__file__).parents[2] / "build" / "sanitized" / "classfair"


def load() -> None:
    (path,) = BUILT.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("classfair._C", path)
    assert spec is not None
    assert spec.loader is not None
    import torch  # noqa: F401  (the module needs its libraries)

    sys.modules["classfair._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


load()

if __name__ == "__main__":
    from tests.fuzz.__main__ import main

    main()
