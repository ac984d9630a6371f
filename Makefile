PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test soak test-slurm lint bench clean

run: $(READY)  ## set up, then run the main job
	$(BIN)/cl-runner $(ARGS)

test: $(READY)  ## set up, then run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

soak: $(READY)  ## kill runs at random moments, and check that their results do not change
	$(BIN)/python tests/soak.py --kills 100 $(ARGS)

test-slurm: $(READY)  ## test preemption and time limits on a one-node SLURM (root; Debian: slurmctld slurmd slurm-client munge)
	$(BIN)/python tests/slurm/run.py $(ARGS)

lint: $(READY)  ## ruff, pyright and the other pre-commit checks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pre-commit run --all-files

bench: $(READY)  ## time the runner beside a bare loop
	$(BIN)/python benchmarks/stream.py

clean:
	rm -rf $(VENV) build dist

# uv installs the torch stack several times faster than pip, which is the fallback. Bytecode is compiled here because
# some environments do not let Python cache it, and every start would then take twice as long.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || echo "no uv: pip takes a little longer"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'; \
	else $(BIN)/python -m pip install --quiet --editable '.[dev]'; fi
	touch $@
