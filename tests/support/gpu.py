"""What the tests that only a GPU can run share."""

import contextlib

import pytest
import torch

from classfair import backends


def backend_fixture(primitive):
    """Each back-end with kernels for GPUs in turn, by name."""

    @pytest.fixture(params=["native", "triton"])
    def backend(request):
        device = torch.device("cuda")
        if request.param not in backends.usable(primitive, device):
            pytest.skip(backends.why_missing(primitive, device, request.param))
        return request.param

    return backend


@contextlib.contextmanager
def no_sync():
    """What makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function):
    """The function recorded in a CUDA graph, after a warm-up beside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
