# make pretrain   train the tiny preset on a CPU and end with a score, a sample and a saved model in runs/tiny
# make test       run all tests
# make style      check lint and format
# make clean      remove the environment and caches; runs/ stays
# Each sets up .venv by itself. PYTHON chooses the interpreter, PIP_EXTRA_INDEX_URL another build of torch
# (https://download.pytorch.org/whl/cpu is the small one, without CUDA).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: pretrain test style clean

# --resume auto: a run that was interrupted continues where its last checkpoint left it.
pretrain: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/accelerate launch --config_file configuration/accelerate/cpu.yaml scripts/pretrain_enwik8.py \
		--training_preset configuration/training/tiny.yaml --output_dir runs/tiny --resume auto

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find modeling_aft scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Choose another: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
