# Two commands for a newcomer: `make train` and `make test`. They print what they run, so that
# any line can be typed by hand. The packages go into $(VENV), in the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/digits.yaml
ARGS ?=
# Processes that run tests at the same time; a system test starts up to 4 ranks of its own, but
# most of its time goes by in waiting.
JOBS ?= 4

BIN = $(VENV)/bin
# One rank for every GPU that torch can use, else 2 on the CPU.
RANKS ?= $(or $(shell $(BIN)/python -c "import torch; print(torch.cuda.is_available() and torch.cuda.device_count() or 2)" 2>/dev/null),2)
# A new run gets a new directory: runs/digits-1, runs/digits-2, ...
STEM = $(basename $(notdir $(CONFIG)))
LAST = $(shell ls runs 2>/dev/null | sed -n 's/^$(STEM)-\([0-9][0-9]*\)$$/\1/p' | sort -n | tail -n 1)
RUN ?= runs/$(STEM)-$(shell expr 0$(LAST) + 1)

PYTEST = $(BIN)/pytest -n $(JOBS) --dist loadgroup

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Where it is set, as in many images, each of the tests' processes compiles the launcher anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help train test test-all test-gpu lint bench

help:
	@echo 'make train     train on real data: creates $(VENV) at the first call, then starts torchrun'
	@echo 'make test      lint, type check and the tests that cover everything in a few minutes'
	@echo 'make test-all  the same with the long tests'
	@echo 'make test-gpu  what only a GPU can show, and its benchmarks: with GPU_PYTHON, offline, in minutes'
	@echo 'make lint      ruff and mypy alone'
	@echo 'make bench     the launcher beside a loop by hand and its peers (QUICK= for an hour of it)'
	@echo
	@echo 'make train RANKS=4                        processes (default: every GPU, else 2 on the CPU)'
	@echo 'make train CONFIG=configs/digits.yaml     the config file'
	@echo 'make train ARGS="OPTIM.LR 0.05"           more options and KEY VALUE overrides'
	@echo 'make train RUN=runs/mine                  the run directory (default: the next free number)'
	@echo 'make train RUN=runs/mine ARGS=--resume    go on with an interrupted run'
	@echo 'make train PYTHON=python3.12 VENV=.venv   the Python that creates the environment, and where'

train: $(VENV)/.installed-examples
	$(BIN)/torchrun --standalone --nproc-per-node=$(RANKS) tools/train.py --config-file $(CONFIG) OUTPUT_DIR $(RUN)$(if $(ARGS), $(ARGS))
	@if [ -d $(RUN) ]; then \
	    echo; \
	    echo 'The run is in $(RUN):'; \
	    echo '    $(RUN)/metrics.jsonl     one record a line: what was measured, and when'; \
	    echo '    $(RUN)/logs/rank0.log    the log; one file a rank'; \
	    echo '    $(RUN)/config.yaml       every setting of this run'; \
	    echo '    $(RUN)/checkpoints       what it can go on from'; \
	    echo 'To see the curves:'; \
	    echo '    $(BIN)/tensorboard --logdir $(RUN)/tensorboard'; \
	fi

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

# With a Python that has a CUDA build of torch; nothing is installed. What such a Python most often
# lacks can be brought along: pip download yacs jsonlines orjson rich tensorboard psutil PyYAML
# scikit-learn pytest pytest-timeout, on a machine like it, then pip install --no-index -f.
GPU_PYTHON ?= python3
test-gpu: export PYTHONPATH := $(CURDIR)
test-gpu:
	$(GPU_PYTHON) -c 'import torch, yacs, jsonlines, orjson, rich, tensorboard, psutil, yaml, sklearn, pytest_timeout; print(torch.__version__, torch.cuda.get_device_name(0))'
	timeout 300 $(GPU_PYTHON) -m pytest -m gpu tests; code=$$?; \
	timeout 200 $(GPU_PYTHON) benchmarks/compare.py gpu --quick && exit $$code

# On a machine that does nothing else. The tables are told in docs/performance.md.
QUICK ?= --quick
bench: $(VENV)/.installed-bench
	for table in step start run resume kill growth; do $(BIN)/python benchmarks/compare.py $$table $(QUICK) || exit 1; done

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy launcher

# The installs. The checkout is installed in editable mode: a change of the code needs no install.
# A change of the three files named here is installed by the next call of make.

PACKAGING = setup.cfg pyproject.toml constraints.txt

$(VENV)/.installed-examples: $(PACKAGING) | $(BIN)/pip
	@echo '# Installing into $(VENV); the first time takes some minutes, torch is large.'
	$(BIN)/pip install -q -c constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/.installed-test: $(PACKAGING) | $(BIN)/pip
	@echo '# Installing into $(VENV); the first time takes some minutes, torch is large.'
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[examples,test]'  # a minute less
	-$(BIN)/pip install -q --no-deps timm==1.0.31  # of which tests import what needs torch alone
	@touch $(VENV)/.installed-examples $@

$(VENV)/.installed-bench: $(PACKAGING) | $(BIN)/pip
	$(BIN)/pip install -q -c constraints.txt -e '.[examples,bench]'
	@touch $@

# The last file that `python -m venv` creates: without it an interrupted attempt is made again.
$(BIN)/pip:
	$(if $(shell $(PYTHON) -c "import sys; sys.version_info >= (3, 10) and print(1)" 2>/dev/null),,$(error '$(PYTHON)' is not Python 3.10 or newer: name one, for example make PYTHON=python3.12))
	$(if $(shell $(PYTHON) -c "import ensurepip, venv; print(1)" 2>/dev/null),,$(error '$(PYTHON)' has no venv module: install it (Debian, Ubuntu: apt install python3-venv)))
	$(PYTHON) -m venv $(VENV)
