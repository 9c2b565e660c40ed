# Everything happens in .venv inside this checkout; `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := pyproject.toml .ci/constraints.txt .ci/bootstrap.py

.PHONY: help setup dev demo slurm test test-long lint bench chaos gpu clean

help:
	@echo "make demo    train a small Llama2-style transformer on 2 emulated hosts x 4 ranks of this machine"
	@echo "make test    lint, format, types and tests; as root on Debian and Ubuntu it installs Slurm for them"
	@echo "make test-long   the other tests: hosts that are lost, every kind of failure, training across hosts"
	@echo "make setup   only make $(VENV) and install what runs need; make dev: and what tests need. TORCH=cpu|cuda names"
	@echo "             the build of torch (default: by whether this machine has a GPU); VENV=DIR an environment that is"
	@echo "             there, which keeps its torch; PYTHON=python3.12 the Python of a new one"
	@echo "make bench   benchmarks: one table of ratios with their goals, also as build/benchmarks.json; 20 minutes"
	@echo "make chaos   strike N=100 runs at random moments, and compare each with the undisturbed run; SEED=1,"
	@echo "             EXECUTOR=both (local and slurm in turn), AT_ONCE=2"
	@echo "make gpu     on a machine with a GPU: the tests that need one, then tests/benchmarks/gpu.py"
	@echo "make clean   remove $(VENV) and caches; run directories stay"

setup: $(VENV)/.ready
dev: $(VENV)/.ready-dev

$(VENV)/.ready: $(SETUP)
	@$(PYTHON) .ci/bootstrap.py $(VENV) $(if $(TORCH),--torch $(TORCH))
	@touch $@

$(VENV)/.ready-dev: $(SETUP)
	@$(PYTHON) .ci/bootstrap.py $(VENV) dev $(if $(TORCH),--torch $(TORCH))
	@touch $(VENV)/.ready $@

# Who names a build of torch wants it also where an environment is ready.
ifneq ($(TORCH),)
$(VENV)/.ready $(VENV)/.ready-dev: FORCE
endif
FORCE:

demo: setup
	$(BIN)/python submit.py tp_fsdp --executor local --nodes 2 --gpus-per-node 4 tp=4

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In it: a line where Slurm or a browser is missing, and what is done about it.
slurm: dev
	@$(BIN)/python .ci/slurm_packages.py

# Compiled once: the tests start hundreds of processes, and where PYTHONDONTWRITEBYTECODE is set each would do it anew.
test: lint slurm
	@$(BIN)/python -m compileall -q jobs workloads submit.py
	$(BIN)/python -m pytest -m "not long" -n 4 --dist loadfile --no-loadscope-reorder

test-long: slurm
	$(BIN)/python -m pytest -m long -n 4 --dist loadfile --no-loadscope-reorder

bench: slurm
	$(BIN)/python -m tests.benchmarks.start_up
	$(BIN)/python -m tests.benchmarks.failures
	$(BIN)/python -m tests.benchmarks.slurm_start
	$(BIN)/python -m tests.benchmarks.script_start
	$(BIN)/python -m tests.benchmarks.failure_tour
	$(BIN)/python -m tests.benchmarks.pipeline_bubble
	$(BIN)/python -m workloads.pipeline_mlp.simulate
	$(BIN)/python -m tests.benchmarks

N ?= 100
SEED ?= 1
EXECUTOR ?= both
AT_ONCE ?= 2
chaos: slurm
	$(BIN)/python -m tests.chaos --rounds $(N) --seed $(SEED) --executor $(EXECUTOR) --at-once $(AT_ONCE)

# Both lines also run with any python3 that has torch and pytest, without $(VENV).
gpu: dev
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m tests.benchmarks.gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
