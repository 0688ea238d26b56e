# Everything that a developer or CI runs. Needs Python 3.11+ with pip, a C++20 compiler and make; the rest is
# bootstrapped into this folder: uv in .tools, the locked environment in .venv, the oracles of `make parity` in .parity.

PYTHON ?= python3
UV_VERSION := 0.13.9
UV := .tools/bin/uv
UV_STAMP := .tools/uv-$(UV_VERSION)
VENV := $(CURDIR)/.venv
PARITY_STAMP := .parity/installed
MODEL := smollm2:135m
MODEL_HOME := $(CURDIR)/build/home
NATIVE_FILES = $(shell find native -name '*.cc' -o -name '*.cpp' -o -name '*.h' -o -name '*.inc')

export UV_PYTHON_DOWNLOADS := never
# The certificates that the system trusts, as pip does: behind a company proxy the ones uv brings along are not enough.
export UV_SYSTEM_CERTS ?= 1
export PIP_ROOT_USER_ACTION := ignore
.DEFAULT_GOAL := help
.PHONY: help setup build demo test check format docs parity sanitize bench lock model clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(UV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nomoat needs Python 3.11 or newer, found %s; try make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -m pip install --quiet --upgrade --target .tools uv==$(UV_VERSION)
	@touch $@

.venv/pyvenv.cfg: | $(UV_STAMP)
	@echo "First time here: fetching packages into .venv and compiling, about two minutes"
	@$(UV) venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv

setup: build ## Create .venv from uv.lock and compile the native module
	@echo "ready: .venv/bin/nomoat --help"

# Without build isolation the module is compiled with the tools in .venv and in a folder that is kept (build/<wheel tag>), so
# that a change compiles one file.
build: | $(UV_STAMP) .venv/pyvenv.cfg ## Bring .venv up to date; compiles only what changed
	@$(UV) sync --quiet --frozen --no-build-isolation-package nomoat

demo: build ## The whole job on real input: train, score before and after, ask
	@$(VENV)/bin/python examples/demo.py

model: build
	@NOMOAT_HOME=$(MODEL_HOME) $(VENV)/bin/nomoat pull $(MODEL)

# A test that needs the model must not be skipped unseen: NOMOAT_SMOLLM2 turns its absence into an error.
MODEL_PATH = NOMOAT_HOME=$(MODEL_HOME) $(VENV)/bin/python -c 'from nomoat.hub.names import resolve; print(resolve("$(MODEL)", offline=True))'

test: model ## Run the tests, the real model included
	@model=$$($(MODEL_PATH)) && NOMOAT_SMOLLM2="$$model" $(VENV)/bin/pytest -q -n 2

check: build ## Lint, types, formatting, layout
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@$(if $(NATIVE_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_FILES))
	$(VENV)/bin/python tools/check_layout.py

format: build ## Format Python and C++
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	@$(if $(NATIVE_FILES),$(VENV)/bin/clang-format -i $(NATIVE_FILES))

docs: build ## Write the generated files again: the command reference, the native module's types
	@$(VENV)/bin/python tools/make_cli_reference.py
	@$(VENV)/bin/python -m nanobind.stubgen -q -m nomoat._native -o src/nomoat/_native.pyi

# torch goes in first and by itself, with pip: pip follows the machine's configuration (a local wheel, a CPU-only index).
# The native module and pytest come from .venv, which is put behind the oracles' own packages.
$(PARITY_STAMP): tests/parity/requirements.txt | build
	@$(UV) venv --quiet --clear --seed --python $(VENV)/bin/python .parity
	@.parity/bin/python -m pip install --quiet "$$(grep '^torch==' $<)"
	@.parity/bin/python -m pip install --quiet -r $<
	@.parity/bin/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/nomoat_venv.pth", "w").write("import site; site.addsitedir(%r)\n" % "'"$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"'")'
	@touch $@

parity: model $(PARITY_STAMP) ## Compare with torch, transformers, PEFT and llama.cpp, in their own environment
	@model=$$($(MODEL_PATH)) && NOMOAT_SMOLLM2="$$model" .parity/bin/python -m pytest -q -W default tests/parity

sanitize: build ## Run the native tests under the address and undefined-behaviour sanitizers
	@PATH="$(VENV)/bin:$$PATH" cmake -S . -B build/sanitize -G Ninja -DNOMOAT_MODULE=OFF -DNOMOAT_TESTS=ON \
	  -DNOMOAT_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g" --log-level=WARNING
	@PATH="$(VENV)/bin:$$PATH" cmake --build build/sanitize
	@build/sanitize/native_tests

bench: build ## Measure against peers in one run; writes JSON under bench/results
	@$(VENV)/bin/python bench/run.py

lock: | $(UV_STAMP) ## Resolve the dependencies again and write uv.lock
	@$(UV) lock --upgrade

clean: ## Remove what was built
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests tools bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Remove the environments too
	rm -rf .venv .parity .tools
