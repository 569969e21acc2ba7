# make train: set up, prepare a real corpus, pretrain, evaluate, export, write, draw.
# make test:  set up and run every check. Both may be run again at any time; what is done is not done twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test lint faults slurm-test clean

PYTHON ?= python3
TORCH := torch==2.13.0
BIN := .venv/bin
HEADRACE := $(BIN)/headrace
RUN := runs/quickstart
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

help:
	@sed -n '1,2s/^# //p' Makefile

# Torch goes first and pinned: a looser request brings gigabytes of another build.
.venv/train.done: requirements/train.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -r requirements/train.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	mkdir -p .venv/types && ln -sfn ../.. .venv/types/headrace
	touch $@

.venv/test.done: .venv/train.done requirements/test.txt
	$(PIP) -r requirements/test.txt
	touch $@

train: .venv/train.done
	$(HEADRACE) prepare
	$(HEADRACE) train configs/quickstart.toml --nproc 2 --until 600
	$(HEADRACE) train configs/quickstart.toml --nproc 2  # goes on from the checkpoint
	$(HEADRACE) eval $(RUN)
	$(HEADRACE) export $(RUN)
	$(HEADRACE) generate $(RUN) --prompt "def read_lines(path):" --max-new-tokens 120
	$(HEADRACE) report $(RUN)

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --durations=15 --numprocesses=2

# Everything that is done to runs on purpose, often; writes docs/faults.md.
faults: .venv/test.done
	HEADRACE_FAULTS=long HEADRACE_WRITE_DOCS=1 $(BIN)/python -m pytest -m fault

# Real slurm, two nodes on this machine; as root, where Debian's packages can be installed.
slurm-test: .venv/test.done
	bash tests/slurm/install.sh
	HEADRACE_SLURM=1 $(BIN)/python -m pytest -s tests/slurm

# What can be made again; runs stay.
clean:
	rm -rf .venv build *.egg-info
