# SPDX-License-Identifier: MIT
# make demo     install into .venv and run an experiment on real photographs
# make segment  the same: train a segmenter on real photographs, with and without ALGM
# make digits   the same: train a ViT on handwritten digits, and the same with fewer tokens by each method
# make test     install into .venv and run all tests that run here
# make test-fast the same without the slow tests and those that need a GPU
# make lint     formatters, linters, types
# make sanitize build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run the ops' tests with them;
#               fails on the first report. Needs GCC and its libasan. SANITIZE_TESTS selects other tests.
# make gpu      on a machine with a GPU: build, check, test, sanitize, tune, benchmark, write the results (see below)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
SEGMENT_ARGS ?=
DIGITS_ARGS ?=

.PHONY: demo segment digits test test-fast lint sanitize format clean gpu gpu-build gpu-check gpu-test gpu-sanitize gpu-memcheck \
  gpu-racecheck gpu-synccheck gpu-memcheck-triton gpu-tune gpu-bench gpu-micro gpu-model gpu-memory gpu-table gpu-collect

demo: $(VENV)/installed
	$(BIN)/python experiments/accelerate_vit.py $(DEMO_ARGS)

segment: $(VENV)/installed
	$(BIN)/python experiments/segment.py $(SEGMENT_ARGS)

digits: $(VENV)/installed
	$(BIN)/python experiments/train_digits.py $(DIGITS_ARGS)

# A file at a time in each process, so that what a file builds for its tests is built once; threads that wait, sleep.
test test-fast: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(SELECTED)
test-fast: SELECTED := -m "not slow and not gpu"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# The instrumented module is in a copy of the package, in build/sanitize. Python is not instrumented, so libasan is
# preloaded, and leaks at exit are not reported. libstdc++ is preloaded so that libasan finds __cxa_throw. pytest must
# not capture file descriptors: the process ends at the first report, and the report would be lost.
SANITIZE_TESTS ?= tests/conformance tests/test_token_map.py tests/test_properties.py tests/robustness/test_zero_sizes.py
sanitize: $(VENV)/required
	TOKRED_SANITIZE=1 TOKRED_CUDA=0 TOKRED_BUILD_DIR=build/sanitize/cmake $(BIN)/pip install --quiet \
	  --disable-pip-version-check --no-deps --upgrade --target build/sanitize/package .
	PYTHONPATH=build/sanitize/package OMP_WAIT_POLICY=passive TOKRED_SELFCHECK=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --capture=sys $(SANITIZE_TESTS)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# The requirements go in first, so that installing the package does not choose another torch.
$(VENV)/required: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/installed: $(VENV)/required $(NATIVE_SOURCES)
	TOKRED_BUILD_DIR=build/venv $(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# `make gpu` runs on a machine with a GPU and uses $(PYTHON) with its own torch and triton. It writes benchmarks/results/,
# docs/lookup_memory_cuda.*, tokred_kernels/backends/triton/tuned.json, build/gpu/ and the README's table. Each step also
# runs alone, and `make -k gpu` continues after a step that failed. If a machine is available for some minutes at a time:
#   make gpu-build GPU_ARCHS=90a                  an H100 only, in a fraction of the time; default: see setup.py
#   make gpu-test GPU_FILES=tests/conformance MINUTES=8   some of the tests, for 8 minutes at most
#   make gpu-sanitize SANITIZE_ARGS="--skip grid" without a check that loses the device
#   make gpu-micro MINUTES=8                      repeat it until the run is complete
#   make gpu-collect TO=folder                    everything written, in folder/gpu-results.tar.gz
# Without a git repository, set TOKRED_COMMIT to the commit of the tree.
GPU_BUILD := build/gpu
GPU_ARCHS ?= $(TOKRED_CUDA_ARCHS)
GPU_BACKENDS ?= cuda,triton
GPU_DAY ?= $(shell date -u +%F)
MINUTES ?= 60
# All tests that are marked gpu lie here. Other files may need packages that the machine lacks.
GPU_FILES ?= tests/conformance tests/backends tests/benchmarks tests/cuda/test_device.py tests/test_token_map.py \
  tests/test_torch_integration.py tests/test_token_attention_use.py
# A process that loses the device (tests/conftest.py), or whose kernel hangs, ends; pytest-xdist starts another one.
GPU_TESTS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive timeout --signal INT $(MINUTES)m \
  $(PYTHON) -m pytest -m gpu --continue-on-collection-errors \
  $(shell $(PYTHON) -c "import xdist; print('-n 16 --max-worker-restart 1000')" 2>/dev/null) \
  $(shell $(PYTHON) -c "import pytest_timeout; print('--timeout 180 --timeout-method thread')" 2>/dev/null)
TUNED_TESTS := $(addprefix tests/conformance/test_,token_attention.py token_attention_packed.py lookup_gather.py \
  lookup_scatter.py)
# The sanitizer checks the kernels of this package only, selected by a part of their mangled names.
SANITIZER = TOKRED_SELFCHECK=0 compute-sanitizer --target-processes application-only --error-exitcode 1
SANITIZE_ARGS ?=

gpu: gpu-build gpu-check gpu-test gpu-sanitize gpu-tune gpu-bench gpu-table

gpu-build:
	TOKRED_CUDA=1 TOKRED_CUDA_ARCHS="$(GPU_ARCHS)" TOKRED_BUILD_DIR=$(GPU_BUILD) \
	  $(PYTHON) -m pip install --no-build-isolation --no-deps -e .

gpu-check:
	$(PYTHON) -m tokred_kernels check --deep

gpu-test:
	$(GPU_TESTS) $(GPU_FILES)

# racecheck and synccheck are for the CUDA kernels: Triton places the barriers of its own.
gpu-sanitize: gpu-memcheck gpu-racecheck gpu-synccheck gpu-memcheck-triton

# memcheck needs allocations by the driver: in a block of torch's cache a stray access would find valid memory.
gpu-memcheck gpu-memcheck-triton: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
gpu-memcheck: SANITIZER += --report-api-errors no
gpu-memcheck gpu-racecheck gpu-synccheck: gpu-%:
	$(SANITIZER) --tool $* --kernel-name kns=tokred $(PYTHON) tests/cuda/sanitize.py cuda $(SANITIZE_ARGS)

gpu-memcheck-triton:
	$(SANITIZER) --report-api-errors no --tool memcheck $$($(PYTHON) tests/cuda/sanitize.py triton --filters) \
	  $(PYTHON) tests/cuda/sanitize.py triton $(SANITIZE_ARGS)

gpu-tune:
	$(PYTHON) benchmarks/tune.py --minutes 5
	$(GPU_TESTS) $(TUNED_TESTS)

gpu-bench: gpu-micro gpu-model gpu-memory

gpu-model: GPU_BACKENDS := auto,$(GPU_BACKENDS)
gpu-micro gpu-model: gpu-%:
	$(PYTHON) benchmarks/run.py --device cuda --suite $* --backend $(GPU_BACKENDS) --minutes $(MINUTES) \
	  --resume benchmarks/results/$(GPU_DAY)-cuda-$*.json

gpu-memory:
	$(PYTHON) experiments/lookup_memory.py --device cuda --out docs/lookup_memory_cuda.png

gpu-table:
	$(PYTHON) benchmarks/table.py

gpu-collect:
	@test -n "$(TO)" || { echo "error: TO must name a folder: make gpu-collect TO=folder"; exit 1; }
	mkdir -p "$(TO)"
	tar -czf "$(TO)/gpu-results.tar.gz" $$(ls -d benchmarks/results README.md docs/lookup_memory_cuda.* \
	  tokred_kernels/backends/triton/tuned.json 2>/dev/null)

clean:
	rm -rf build $(VENV) out tokred_kernels/*.so
