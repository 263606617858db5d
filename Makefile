# SPDX-License-Identifier: MIT
# make demo     install into .venv and run the example on real photographs
# make segment  the same: train a segmenter on real photographs, with and without ALGM
# make digits   the same: train a ViT on handwritten digits, and the same with fewer tokens by each method
# make test     install into .venv and run the tests
# make lint     formatters, linters, types
# make gpu      on a machine with a GPU: build, test, sanitize, tune, benchmark, write the results (see below)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
SEGMENT_ARGS ?=
DIGITS_ARGS ?=

.PHONY: demo segment digits test lint format clean gpu gpu-build gpu-test gpu-sanitize gpu-memcheck \
  gpu-racecheck gpu-synccheck gpu-memcheck-triton gpu-tune gpu-commit gpu-bench gpu-micro gpu-verify \
  gpu-model gpu-memory gpu-table gpu-collect

demo: $(VENV)/installed
	$(BIN)/python examples/accelerate_vit.py $(DEMO_ARGS)

segment: $(VENV)/installed
	$(BIN)/python examples/segment.py $(SEGMENT_ARGS)

digits: $(VENV)/installed
	$(BIN)/python examples/train_digits.py $(DIGITS_ARGS)

# A file at a time in each process, so that what a file builds for its tests is built once; threads that wait, sleep.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

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

# Uses $(PYTHON) as it is, with its own torch and triton: GPU machines bring theirs. Everything it writes lands in
# benchmarks/results/, docs/, tokred_kernels/backends/, build/gpu/ and the README's table. Each step is for itself:
# `make -k gpu` goes on after one that failed, and the later ones make do with what there is. Where a machine is lent
# for minutes, tests and benchmarks can be cut into several commands:
#   make gpu-build GPU_ARCHS=90a                      for an H100 alone, in a fraction of the time; default: all
#   make gpu-test GPU_FILES=tests/ops GPU_PART=-ops   some of the tests, reported in build/gpu/gpu-tests-ops.xml
#   make gpu-test MINUTES=8                           start none later; those that are left count as failed
#   make gpu-sanitize SANITIZE_ARGS="--skip grid"     what is left where something lost the device
#   make gpu-micro MINUTES=8                          again until it is complete; keeps what the day's file has
#   make gpu-collect TO=folder                        all that was written, as folder/gpu-results.tar.gz
# A tree that came without its repository is told its commit by TOKRED_COMMIT in the environment.
# The tests are those of kernels, tuned or not, and come again after tuning.
GPU_BUILD := build/gpu
GPU_ARCHS ?= $(TOKRED_CUDA_ARCHS)
GPU_PART ?=
GPU_BACKENDS ?= cuda,triton
GPU_DAY ?= $(shell date -u +%F)
MINUTES ?= 60
# What a GPU has to do with; a test fails where a GPU's test lies elsewhere. Other files need packages that it may lack.
GPU_FILES ?= tests/ops tests/backends tests/benchmarks tests/cuda/test_device.py tests/test_token_map.py \
  tests/test_torch_integration.py tests/test_token_attention_use.py
# A process that loses the device, or waits for a kernel without end, ends, and another does what is left
# (tests/lost_device.py); workers are replaced as often as it takes.
GPU_TESTS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -m gpu --continue-on-collection-errors \
  --minutes $(MINUTES) $(shell $(PYTHON) -c "import xdist; print('-n 16 --max-worker-restart 1000')" 2>/dev/null) \
  $(shell $(PYTHON) -c "import pytest_timeout; print('--timeout 180 --timeout-method thread')" 2>/dev/null)
TUNED_TESTS := tests/ops/test_token_attention.py tests/ops/test_token_attention_packed.py \
  tests/ops/test_lookup_gather.py tests/ops/test_lookup_scatter.py
# Only this package's kernels are looked at, and neither torch's nor those of the libraries that it calls: by a part of
# the mangled name. CUDA's have their namespace in it; Triton's are found by name, each.
SANITIZER = compute-sanitizer --target-processes application-only --error-exitcode 1
SANITIZE_ARGS ?=
SANITIZE_CUDA = --kernel-name kns=tokred $(PYTHON) tests/cuda/sanitize.py cuda $(SANITIZE_ARGS)
SANITIZE_TRITON = $$($(PYTHON) tests/cuda/sanitize.py triton --filters) $(PYTHON) tests/cuda/sanitize.py triton \
  $(SANITIZE_ARGS)
GPU_RUN = $(PYTHON) benchmarks/run.py --device cuda --minutes $(MINUTES)
GPU_WRITES = tokred_kernels/backends/triton/tuned.json tokred_kernels/backends/verified.json benchmarks/results \
  docs/lookup_memory_cuda.* README.md $(GPU_BUILD)/gpu-tests*.xml
gpu: gpu-build gpu-test gpu-sanitize gpu-tune gpu-bench
# In this order: `auto`, by which models are measured, takes what is verified.
gpu-bench: gpu-micro gpu-verify gpu-model gpu-memory gpu-table

gpu-build:
	TOKRED_CUDA=1 TOKRED_CUDA_ARCHS="$(GPU_ARCHS)" TOKRED_BUILD_DIR=$(GPU_BUILD) \
	  $(PYTHON) -m pip install --no-build-isolation --no-deps -e .

gpu-test:
	$(GPU_TESTS) $(GPU_FILES) --junitxml=$(GPU_BUILD)/gpu-tests$(GPU_PART).xml

# memcheck: memory is asked of the driver, not of torch's cache, in whose blocks a stray access would find memory.
# Triton places the barriers of its kernels itself: racecheck and synccheck are for those of CUDA.
gpu-sanitize: gpu-memcheck gpu-racecheck gpu-synccheck gpu-memcheck-triton

gpu-memcheck:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no $(SANITIZE_CUDA)

gpu-racecheck:
	$(SANITIZER) --tool racecheck $(SANITIZE_CUDA)

gpu-synccheck:
	$(SANITIZER) --tool synccheck $(SANITIZE_CUDA)

gpu-memcheck-triton:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no $(SANITIZE_TRITON)

gpu-tune:
	$(PYTHON) benchmarks/tune.py --minutes 5
	$(GPU_TESTS) $(TUNED_TESTS) --junitxml=$(GPU_BUILD)/gpu-tests-tuned.xml

gpu-commit:
	@test -n "$$TOKRED_COMMIT" || git rev-parse --quiet --verify HEAD >/dev/null || \
	  { echo "error: there is no repository here: set TOKRED_COMMIT to the commit that this tree is of"; exit 1; }

gpu-micro: gpu-commit
	$(GPU_RUN) --suite micro --backend $(GPU_BACKENDS) --resume benchmarks/results/$(GPU_DAY)-cuda-micro.json

gpu-verify: gpu-commit
	$(PYTHON) benchmarks/verify.py $(GPU_BUILD)/gpu-tests*.xml \
	  --results benchmarks/results/$(GPU_DAY)-cuda-micro.json

gpu-model: gpu-commit
	$(GPU_RUN) --suite model --backend auto,$(GPU_BACKENDS) --resume benchmarks/results/$(GPU_DAY)-cuda-model.json

gpu-memory:
	$(PYTHON) benchmarks/lookup_memory.py --device cuda --out docs/lookup_memory_cuda.png

gpu-table:
	$(PYTHON) benchmarks/table.py

gpu-collect:
	@test -n "$(TO)" || { echo "error: say where to: make gpu-collect TO=folder"; exit 1; }
	mkdir -p "$(TO)"
	tar -czf "$(TO)/gpu-results.tar.gz" $$(ls -d $(GPU_WRITES) 2>/dev/null)

clean:
	rm -rf build $(VENV) out tokred_kernels/*.so
