# make demo    fine-tune the tiny Falcon on the FAQ, CPU or GPU
# make test    the whole test suite
# make lint    ruff and pyright
# make bench   the benchmarks; they need a GPU
#
# Each makes .venv where there is none and installs what it needs; the second call goes straight to work.

PYTHON ?= python3
BIN := .venv/bin
BENCHMARKS ?= falcon7b

.PHONY: demo test lint bench

demo: .venv/.with-train,plot
	$(BIN)/qlite finetune

test: .venv/.with-test
	$(BIN)/python -m pytest

lint: .venv/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/.with-train,plot
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

# The packages of the system are seen where torch is among them, so that the torch that is installed is the one used.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("qlite needs Python 3.10 or newer; PYTHON=... chooses one")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'from importlib.util import find_spec; find_spec("torch") and print("--system-site-packages")') .venv

# No torch yet and no NVIDIA GPU: the version of constraints.txt. Otherwise pip chooses, or leaves what is there.
.venv/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$*]' \
	    $$($(BIN)/python -c 'from importlib.util import find_spec; raise SystemExit(find_spec("torch") is not None)' \
	    && ! command -v nvidia-smi >/dev/null && echo "--constraint constraints.txt")
	@touch $@
