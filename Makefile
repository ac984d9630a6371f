PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test soak test-slurm lint bench clean

run: $(READY)  ## set up, then the main job
	$(BIN)/cl-runner $(ARGS)

test: $(READY)  ## set up, then the tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

soak: $(READY)  ## kill runs at random moments, and see that they end as if they had not been
	$(BIN)/python tests/soak.py --kills 100 $(ARGS)

test-slurm: $(READY)  ## a SLURM of one node: jobs preempted and out of time (root; Debian: slurmctld slurmd slurm-client munge)
	$(BIN)/python tests/slurm/run.py $(ARGS)

lint: $(READY)  ## ruff, pyright, and what else pre-commit holds
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

bench: $(READY)  ## the runner beside a bare loop
	$(BIN)/python benchmarks/stream.py

clean:
	rm -rf $(VENV) build dist

# uv installs the torch stack several times faster than pip; pip is there where uv is not to be had. Compiled here, since
# not every environment lets Python keep what it compiles, and a start would then take twice as long.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || echo "no uv: pip takes a little longer"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'; \
	else $(BIN)/python -m pip install --quiet --editable '.[dev]'; fi
	touch $@
