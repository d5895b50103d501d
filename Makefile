# Every target does its own set-up. The environment is .venv, or the one VENV names.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Packages for the build itself: the editable install uses the environment's torch instead of fetching a second one.
BUILD := "setuptools>=77" "torch>=2.10" ninja "pybind11>=2.13" numpy
GPU_VENV ?= .venv-gpu
GPU_PYTEST = $(GPU_VENV)/bin/python -m pytest -o addopts="--strict-markers -ra"
SANITIZED := plain-3x31 or plain-3x1025 or all-many-rows or mixed-all or dense-all or strided-3d \
  or skewed or nonfinite or 3x33 or cells-zeros or 17x17x16
CPP := $(shell find csrc tests/cuda_emulator -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
SOURCES := $(filter csrc/%,$(CPP)) setup.py pyproject.toml
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
HAS_TRITON = $(BIN)/python -c "import triton" 2>/dev/null
# Triton's kernels run on the CPU through its interpreter, which warns of every infinity it meets and takes up to 13 seconds
# for a case. The chosen ones meet every kernel and nearly every combination of inputs.
INTERPRET = TRITON_INTERPRET=1 $(PYTEST) -q -W ignore::RuntimeWarning
INTERPRETED := plain-3x31 or mixed-stats or fwd-all-triton or dense-all or share-all or strided-3d-dense or fwd-nan- or 9x1-3 \
  or 40x7-5- or 33x33-1- or 3x7x2 or 17x17x16 or label_index

.PHONY: help train test test-all test-exhaustive test-cuda-emulated test-gpu fuzz lint format bench bench-features bench-fairness reproduce bench-check bench-gpu sanitize sanitize-cpu cuda-check doctor clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Rebuilt when a source of the extension changes.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(BUILD)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

train: $(VENV)/.installed  ## train on long-tailed digits with two losses and compare them
	$(BIN)/classfair train $(ARGS)

# The last session is the longest: its summary is what CI reads.
test: $(VENV)/.installed  ## run the tests, in at most 4 minutes on 2 cores
	if $(HAS_TRITON); then $(INTERPRET) tests/primitives/test_conformance.py \
	  -k "triton and values_and and (float32 or bfloat16 or int64) and ($(INTERPRETED))"; fi
	$(PYTEST) -m "not slow" $(ARGS)

# On all cores where tests are independent; then what starts processes itself.
test-all: $(VENV)/.installed  ## run what `make test` leaves out: more cases, dtypes, processes, compilers, builds
	if $(HAS_TRITON); then $(INTERPRET) -n auto -q tests/primitives \
	  -k "triton and not gradcheck and not gradgradcheck and not repeat and not float64 and not float16"; fi
	$(PYTEST) -n auto -q -m "slow and not exhaustive" tests/primitives
	$(BIN)/python -m tests.fuzz 1 30
	$(PYTEST) -m "slow and not exhaustive" --ignore=tests/primitives $(ARGS)

# About two hours of 2 cores: a thousand compilations by Triton, and every case and derivative in its interpreter.
test-exhaustive: $(VENV)/.installed  ## run what takes too long for CI: every case and dtype through Triton
	$(INTERPRET) -n auto -q tests/primitives -k triton
	$(PYTEST) -n auto -m exhaustive $(ARGS)

# The .cu files, compiled by g++, serve as back-end `native` of the CPU; see tests/cuda_emulator/README.md.
test-cuda-emulated: $(VENV)/.installed  ## run the CUDA kernels on the CPU: conformance, bounds, barriers, races
	$(PYTEST) -m "" tests/cuda_emulator
	$(PYTEST) -p tests.cuda_emulator.plugin tests/primitives/test_conformance.py tests/primitives/test_reference.py \
	  -k "(native-cpu or (label_index and native)) and not dependence and not iou_penalty" $(ARGS)

# SEED repeats a run. A disagreement prints the call, and the seed that makes it alone.
SECONDS ?= 600
SEED ?= $(shell date +%s)
fuzz: $(VENV)/.installed  ## compare the back-ends on random calls, valid and not, for SECONDS
	$(BIN)/python -m tests.fuzz $(SEED) $(SECONDS)

# Python is not built so, hence the preloads; its own memory is not looked at for leaks, and torch raises where there is none.
SANITIZE_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1
SANITIZED_PYTHON = ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 LD_PRELOAD="$$( \
  for lib in asan ubsan stdc++; do g++ -print-file-name=lib$$lib.so; done | tr '\n' ' ')" $(BIN)/python
sanitize-cpu: $(VENV)/.installed  ## CPU kernels under AddressSanitizer and UBSan: conformance, and a minute of fuzz
	CLASSFAIR_CUDA=0 CLASSFAIR_CXXFLAGS="$(SANITIZE_FLAGS)" LDFLAGS="$(SANITIZE_FLAGS)" CXX=g++ \
	  $(BIN)/python setup.py -q build_ext --build-lib build/sanitized --build-temp build/sanitized/objects
	$(SANITIZED_PYTHON) -m pytest -p tests.fuzz.sanitized tests/primitives/test_conformance.py -q -k "native and cpu and values_and" $(ARGS)
	$(SANITIZED_PYTHON) -m tests.fuzz.sanitized $(SEED) 60

lint: $(VENV)/.installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.installed  ## rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.installed  ## time every back-end beside torch, write benchmarks/results
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-features: $(VENV)/.installed  ## time ISDA and MetaLAD beside the published formulation and plain torch (needs 20 GB)
	$(BIN)/python -m benchmarks.feature_losses $(ARGS)

bench-fairness: $(VENV)/.installed  ## time the group penalties beside loops over cells and plain torch
	$(BIN)/python -m benchmarks.fairness $(ARGS)

# A run that was stopped goes on where it was, as long as the commit is the same.
reproduce: $(VENV)/.installed  ## try what the papers claim, write docs/reproduction.md, in at most 40 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reproduction $(ARGS)

bench-check: $(VENV)/.installed  ## is this tree slower than commit BASE (default: where it left the main branch)?
	$(BIN)/python -m benchmarks.check $(BASE)

# GPU targets need no network: they use the torch, triton, ninja, pybind11 and pytest that $(PYTHON) already has. If that
# is itself the python of an environment, a new one does not inherit its packages: parent.pth says where they are.
$(GPU_VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv --system-site-packages --without-pip $(GPU_VENV)
	$(PYTHON) -c "import site; print(*site.getsitepackages(), sep='\n')" > \
	  "$$($(GPU_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/parent.pth"
	CLASSFAIR_CUDA=1 $(PYTHON) -m pip --python $(GPU_VENV)/bin/python install -q --no-index --no-deps --no-build-isolation -e .
	touch $@

# Triton's compilations take most of the time: on all cores where pytest-xdist is installed. Pytest alone is enough.
# cuBLAS is deterministic, as the tests ask for, with that workspace alone.
test-gpu: $(GPU_VENV)/.installed  ## on a machine with a GPU: conformance of both GPU back-ends
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 \
	  $(GPU_PYTEST) $$($(GPU_VENV)/bin/python -c "import xdist; print('-n auto')" 2>/dev/null) -m "not slow" \
	  tests/primitives tests/gpu -k "cuda or gpu" $(ARGS)

bench-gpu: $(GPU_VENV)/.installed  ## on a machine with a GPU: time both GPU back-ends beside torch
	$(GPU_VENV)/bin/python -m benchmarks.run --device cuda $(ARGS)

# One small case of every kernel; the sanitizers slow a kernel down a hundredfold.
sanitize: $(GPU_VENV)/.installed  ## on a machine with a GPU: compute-sanitizer's four tools
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 CLASSFAIR_TEST_UNPOISONED=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(GPU_PYTEST) tests/primitives/test_conformance.py -k "values_and and native-cuda-float32 and ($(SANITIZED))" || exit 1; \
	done

cuda-check: $(VENV)/.installed  ## compile the CUDA kernels for every released architecture, warnings as errors
	$(BIN)/python csrc/cuda/check.py $(ARGS)

doctor: $(VENV)/.installed  ## show versions and back-ends, and test them
	$(BIN)/classfair doctor

clean:  ## remove what was built
	rm -rf build dist .bench *.egg-info classfair/*.so $(VENV)/.installed
