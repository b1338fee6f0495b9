# Two targets are all a new machine needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The least share of src/flawsift, in lines and branches, that `make test` must reach. It stands here, not in
# pyproject.toml: `pytest` on one file measures nothing and asks for nothing.
COVERED := 95
# A process for each core, but no more than fit into 8 GiB.
SPREAD := --numprocesses auto --maxprocesses 4 --dist loadgroup

# Of `make fuzz`, for all kinds of input together; two of them at a time.
FUZZ_MINUTES ?= 10
# Where the figures of docs/reliability.md come from; benchmarks/render.py writes them there.
CAMPAIGN := benchmarks/results/campaign.csv

.PHONY: demo test cover lint types check docs fuzz kill hooks wheel container ray clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(READY)  ## the main job on real solar cells
	$(BIN)/flawsift demo --out demo

test: $(READY)  ## all tests, and what they reach
	$(BIN)/python -m pytest $(SPREAD) --cov --cov-report= --cov-fail-under $(COVERED)

cover: $(READY)  ## lines and branches that the last `make test` did not reach
	$(BIN)/coverage report --show-missing --skip-covered

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_text.py

types: $(READY)
	$(BIN)/mypy

check: lint types test  ## what a change must pass

docs: $(READY)  ## the pages as a site in build/site; any warning is an error, and fails `make test` too
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "Open build/site/index.html"

fuzz: $(READY)  ## mutated input of every kind; fails where one ends in anything but a clear word
	PYTHONPATH=. $(BIN)/python -m tools.campaign fuzz --minutes $(FUZZ_MINUTES) --results $(CAMPAIGN)

kill: $(READY)  ## every command that writes, killed at random moments
	PYTHONPATH=. $(BIN)/python -m tools.campaign kill --results $(CAMPAIGN)

hooks: $(READY)  ## let git run lint before each commit, and the type checker before each push
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pre-commit
	$(BIN)/pre-commit install

wheel: $(READY)  ## build the wheel, install it into an empty environment, run it
	rm -rf build dist
	$(BIN)/python -m build --quiet --wheel
	rm -rf build/wheel-venv && $(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	build/wheel-venv/bin/flawsift --version
	build/wheel-venv/bin/flawsift detectors
	build/wheel-venv/bin/flawsift demo --help >/dev/null
	build/wheel-venv/bin/python tools/check_wheel.py
	rm -rf build/wheel-venv

container: $(READY)  ## build the image of the server and try it; where no docker or podman runs, the same in an environment
	$(BIN)/python tools/check_container.py

ray: $(READY)  ## what the tests of a cluster need; without it they are skipped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'

clean:
	rm -rf $(VENV) build dist demo .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
