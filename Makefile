# Everything a newcomer needs; each target sets up what it uses. The first run installs, later ones start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
VLLM := .venv-vllm
NEWEST_VLLM := 0.33.0
SOURCES := src tests training
STAMP := $(VENV)/.installed

.PHONY: demo test test-gpu test-oldest test-vllm test-vllm-newest test-vllm-gpu lint format bench clean help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,dev,lm-eval,triton]'
	touch $@

demo: $(STAMP) ## find needles in your own Python's source, with full and with sparse attention
	$(BIN)/tidaldecode demo --output-dir demo-results --overwrite

test: $(STAMP) ## the tests (CPU)
	$(BIN)/python -m pytest -n auto

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

test-gpu: ## the tests of kernels and graphs on an NVIDIA GPU, in the Python that has torch for it
	$(PYTHON) -m pytest -n 8 tests/kernels/test_triton.py tests/kernels/test_append_token.py \
		tests/kernels/test_linear.py tests/kernels/test_rms_norm.py tests/kernels/test_rotate_append.py \
		tests/kernels/test_row_parts.py tests/kernels/test_selection_launches.py tests/bench/test_peers.py tests/gpu

test-oldest: $(OLDEST)/.installed ## the integration tests on the oldest supported transformers
	$(OLDEST)/bin/python -m pytest -n auto -m 'not distribution' tests/integrations

# vLLM asks for the CUDA build of torch and for GPU libraries that its import does not need: no dependencies.
$(VLLM)/.installed $(VLLM)-newest/.installed: pyproject.toml constraints-vllm.txt tests/vllm_plugin/cpu_platform/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt torch
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(if $(findstring newest,$@),$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps vllm==$(NEWEST_VLLM))
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e . -e tests/vllm_plugin/cpu_platform
	touch $@

test-vllm: $(VLLM)/.installed ## the vLLM plugin in the official wheel of the oldest supported vLLM, on a CPU
	$(VLLM)/bin/python -m pytest tests/vllm_plugin

test-vllm-newest: $(VLLM)-newest/.installed ## the same in the newest
	$(VLLM)-newest/bin/python -m pytest tests/vllm_plugin

test-vllm-gpu: ## the vLLM plugin on an NVIDIA GPU, in the Python that has vLLM
	$(PYTHON) -m pytest tests/gpu_vllm

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## time the attention of one decode step on this machine
	$(BIN)/python -m tidaldecode.bench.attention_step

clean: ## remove the environments and caches
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(VLLM)-newest .pytest_cache .mypy_cache .ruff_cache
