# `make demo` and `make test` do all the set-up they need, in a virtual environment of their own.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint bench verify clean help
help:
	@echo "make demo    set up and run the demo (about 3 minutes on 2 cores)"
	@echo "make test    set up and run the tests"
	@echo "make lint    formatting, lint and types"
	@echo "make verify  every implementation that runs here against the fp64 oracle"
	@echo "make clean   remove the virtual environment and outputs"

# torch first and alone, so that nothing else pulls a CUDA build; triton without its dependencies, for the interpreter
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt triton
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/moesaic demo

# the kernels run in Triton's interpreter, which is chosen when triton is imported: their suite is a process of its own
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/kernels -n 2
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

verify: $(READY)
	$(BIN)/moesaic verify

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache .hypothesis
