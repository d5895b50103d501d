"""Speed and memory beside torch: ``python -m benchmarks.run``, ``.check``, ``.table``, or pytest-benchmark."""
