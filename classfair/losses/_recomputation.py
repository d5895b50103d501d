"""Forward passes inside a backward pass: what activation checkpoints compute a second time."""

import torch


def recomputing() -> bool:
    """Whether this thread is in a backward pass. The compiler refuses the question, and recomputes on its own."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
