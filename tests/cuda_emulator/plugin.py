"""``pytest -p tests.cuda_emulator.plugin``: in this process the CUDA kernels are back-end ``native`` of the CPU."""

from tests import cuda_emulator

cuda_emulator.load()
