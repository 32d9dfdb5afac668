# Every target builds what it needs first; none needs another to have run.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
# How many processes share the tests; each has a broker and a database server of its own.
WORKERS ?= 2
# Bytecode is kept, whatever the shell says: without it every process of a stack compiles anew all
# that it imports, which is two thirds of the time that its start takes.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help environment demo up down test check bench bench-long fmt defects

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

environment:
	@$(PYTHON) deploy/local/bootstrap.py

# Make hands DATA, CHAOS and KEEP on through the environment, wherever they were given.
demo: environment ## the main job, start to end; DATA=<csv> replays a trace, CHAOS=<seed> disturbs it, KEEP=1 leaves the stack up
	@$(BIN)/python deploy/demo

up: environment ## start the stack in the background; .hisab/stack.json says where everything is
	@$(BIN)/python deploy/local/stack.py up

down: environment ## end it and remove its data
	@$(BIN)/python deploy/local/stack.py down

test: environment ## every test that can run here, and a list of what was skipped and why; WORKERS=<n> at a time
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

check: environment ## lint, format, types, architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q tests/architecture

bench: environment ## measure against in-run baselines; writes .hisab/bench.json (FIGURES="ledger.charges ..." for some)
	@$(BIN)/python tests/bench $(FIGURES)

bench-long: environment ## measure what grows, at two sizes; by hand, takes long (FIGURES="..." for some)
	@$(BIN)/python tests/bench --long $(FIGURES)

fmt: environment ## format and sort
	@$(BIN)/ruff check --fix --select I .
	@$(BIN)/ruff format .

defects: environment ## known defects of others, by number: our tests, their last results, and what has none
	@$(BIN)/python tests/plugins/defects.py
