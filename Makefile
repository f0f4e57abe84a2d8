# make demo | models | test | test-long | lint | types | check | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The caller's settings for other environments must not reach into ours.
export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONPATH PYTHONHOME

# Tests reach no hub, no telemetry and no display; a thread each gives the same sums on any machine. PROCESSES share the
# files of tests among them.
THREADS ?= 1
PROCESSES ?= 2
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg \
	OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OPENBLAS_NUM_THREADS=$(THREADS) \
	FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
	MLFLOW_DISABLE_TELEMETRY=true SE_OFFLINE=true SE_AVOID_STATS=true

.PHONY: demo models test test-long lint types check clean
.NOTPARALLEL:

demo: $(VENV)/.installed
	$(BIN)/folklora compare recipes/demo.toml --methods celora,local,fedit,ffa,fedsa,sketch,folklora --seeds 1 --out runs/demo

# The small checkpoints of the recipes (examples/README.md), from the raw data in DATA: so many
# steps each, which give the same weights on the same kind of processor whoever makes them.
# Interrupt it and make it again, and it goes on; what is finished stays.
DATA ?= ../shared/data
STEPS-lm := 1900
STEPS-clip := 3100
models: models/tiny-lm/quality.json models/tiny-clip/quality.json models/tiny-albert/quality.json

examples/data/heldout/fashion.npz: | $(VENV)/.installed
	$(BIN)/python examples/prepare_data.py --data $(DATA) --to examples/data

models/tiny-%/quality.json: | examples/data/heldout/fashion.npz # the last that is written
	$(BIN)/python examples/pretrain_tiny_$*.py --steps $(STEPS-$*) --device cpu --to models/tiny-$*

models/tiny-albert/quality.json: | examples/data/heldout/fashion.npz
	$(BIN)/python examples/distil_shared_depth.py --banking $(DATA)/banking77/train.csv --steps 10000 --device cpu --to models/tiny-albert

# ARGS reach pytest: make test ARGS="tests/methods -x"
test: $(VENV)/.installed-dev
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/.installed-dev
	@$(TEST_ENV) $(BIN)/python -m pytest -m slow $(ARGS) # one after another: some stop programs by the clock

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,EXTRA): torch first, so that nothing after it can choose another build.
define install
	@echo "Installing folklora[$(1)] into $(VENV): a few minutes the first time"
	@scripts/install_torch.sh $(BIN)/python
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$(1)]"
	@$(BIN)/python -m pip check
endef

$(VENV)/.installed: pyproject.toml constraints.txt scripts/install_torch.sh | $(BIN)/python
	$(call install,demo)
	@touch $@

# dev contains demo
$(VENV)/.installed-dev: pyproject.toml constraints.txt scripts/install_torch.sh | $(BIN)/python
	$(call install,dev)
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("FolkLoRA needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
