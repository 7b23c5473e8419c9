# Python >= 3.11 and make are enough: every target makes .venv and installs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: install demo test check chaos bench docs clean

install: $(READY)

# torch first and alone: its pin in constraints.txt keeps the CPU build where one is at hand.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "need Python >= 3.11, found " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,deepspeed,ray]'
	touch $(READY)

demo: $(READY)  ## train a small model, probe its checkpoints over HTTP, draw the chart
	$(BIN)/python -m demo.run

# Two files of tests at a time, one thread of torch each: much of a run is waiting for processes.
test: $(READY)  ## everything that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)  ## format, lint, types, generated pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m docs.make_cli_page --check
	$(BIN)/python -m docs.make_jobs_page --check

chaos: $(READY)  ## kill -9 of workers, ranks, server and connections at random, on SQLite and Postgres
	$(BIN)/python -m tests.server.jobs.chaos --jobs 40

bench: $(READY)  ## quick run of every benchmark: ours beside the baseline, as ratios
	for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

docs: $(READY)  ## write the pages that are generated from the code
	$(BIN)/python -m docs.make_cli_page
	$(BIN)/python -m docs.make_jobs_page

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache *.egg-info
