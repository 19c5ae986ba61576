# make demo    fine-tune the packaged tiny Falcon on the packaged FAQ, ask before and after
# make test    the whole test-suite, in two processes of one thread each
# make lint    ruff and pyright
# make bench   the benchmarks that need no GPU
#
# Each makes .venv if it is not there and installs what it needs. A torch that the system's Python has is kept; where there
# is none and no NVIDIA GPU either, constraints.txt names the version. PyPI's torch for Linux brings CUDA's libraries; to get
# the small CPU build from elsewhere: make PIP_INSTALL="pip install --extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_INSTALL ?= pip install
BIN := .venv/bin
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || $(PYTHON) -c "import torch" 2>/dev/null || echo "-c constraints.txt")
SYSTEM_TORCH := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo "--system-site-packages")
INSTALL = $(BIN)/python -m $(PIP_INSTALL) --quiet --disable-pip-version-check $(CONSTRAINTS)

.PHONY: demo test lint bench

demo: .venv/demo.stamp
	$(BIN)/qlite finetune

test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/demo.stamp
	$(BIN)/python -m benchmarks.loss_parity

.venv/bin/python:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'qlite needs Python 3.10 or later'"
	$(PYTHON) -m venv $(SYSTEM_TORCH) .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[train,plot]"
	touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[train,plot,test]"
	touch $@

.venv/lint.stamp: .venv/test.stamp
	$(INSTALL) -e ".[dev]"
	touch $@
