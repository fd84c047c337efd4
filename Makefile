# Everything that a developer runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
SOURCES := execsvc gateway kernels memsvc quire scripts tests examples
PYTEST_ARGS ?=
# Tests of one file stay together: they share servers. The files go in order, so that long ones of few tests are not last.
PYTEST_WORKERS ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# protoc finds its plugins here.
check protos test: export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup up demo test check fmt protos compose-test oracle-setup clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install everything into .venv (quick when nothing changed).
	@scripts/setup.sh

up: setup ## Start memsvc, execsvc and gateway with the demo model; Ctrl-C stops them.
	@$(BIN)/quire serve --model smollm2

demo: setup ## Start everything, stream one answer, show its block table, stop.
	@$(BIN)/quire demo

test: setup oracle-setup ## Run every test that needs no GPU (PYTEST_ARGS are passed on).
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

oracle-setup: setup ## Install transformers, the test oracle, into an environment of its own.
	@scripts/setup_oracle.sh

check: setup ## Check format, lint, types, import contracts, protos and generated code.
	@$(BIN)/ruff format --check $(wildcard $(SOURCES))
	@$(BIN)/ruff check $(wildcard $(SOURCES))
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@$(BIN)/python scripts/generate_protos.py --check

fmt: setup ## Format and fix what can be fixed.
	@$(BIN)/ruff check --fix --quiet $(wildcard $(SOURCES)) || true
	@$(BIN)/ruff format $(wildcard $(SOURCES))
	@$(BIN)/buf format --write

protos: setup ## Generate the code of protos/.
	@$(BIN)/python scripts/generate_protos.py

compose-test: setup ## Build the images, run the container stack, stream an answer, take it down.
	@$(BIN)/python -m scripts.compose_test

clean: ## Remove the environments, caches and logs.
	@rm -rf .venv .venv-* .quire .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
