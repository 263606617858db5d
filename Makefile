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

.PHONY: demo segment digits test lint format clean gpu gpu-build gpu-test gpu-sanitize gpu-tune gpu-bench

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
# benchmarks/results/, tokred_kernels/backends/ and the README's table. Each step is for itself, where a machine is lent
# for minutes; the tests are those of kernels, tuned or not, and come again after tuning.
GPU_BUILD := build/gpu
GPU_TESTS = $(PYTHON) -m pytest -m gpu $(shell $(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null)
TUNED_TESTS := tests/ops/test_token_attention.py tests/ops/test_token_attention_packed.py \
  tests/ops/test_lookup_gather.py tests/ops/test_lookup_scatter.py
gpu: gpu-build gpu-test gpu-sanitize gpu-tune gpu-bench

gpu-build:
	TOKRED_CUDA=1 TOKRED_BUILD_DIR=$(GPU_BUILD) $(PYTHON) -m pip install --no-build-isolation --no-deps -e .

gpu-test:
	$(GPU_TESTS) --junitxml=$(GPU_BUILD)/gpu-tests.xml

gpu-sanitize:
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/cuda/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) tests/cuda/sanitize.py

gpu-tune:
	$(PYTHON) benchmarks/tune.py --minutes 5
	$(GPU_TESTS) $(TUNED_TESTS)
	$(PYTHON) -m pytest tests/backends/test_triton_compile.py -k sm_90

gpu-bench:
	$(PYTHON) benchmarks/run.py --device cuda --suite micro --backend cuda,triton --json
	$(PYTHON) benchmarks/run.py --device cuda --suite model --backend cuda --json
	$(PYTHON) benchmarks/lookup_memory.py --device cuda --out docs/lookup_memory.png
	$(PYTHON) benchmarks/verify.py $(GPU_BUILD)/gpu-tests.xml
	$(PYTHON) benchmarks/table.py

clean:
	rm -rf build $(VENV) out tokred_kernels/*.so
