# The two commands a user needs: `make demo` and `make test`. Each sets up what it needs; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
STAMP := build/stamps

.PHONY: help demo test bench fmt lint type unit bpf lab guest setup clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## system packages, Python environment, BPF objects (done once, then checked in milliseconds)
	@./deploy/setup.sh

# Root is asked for before anything is set up: who lacks it learns that at once.
demo: ## watch an edge pod behind a NAT call a cloud service by its name
	@./deploy/need-root.sh "make demo builds network namespaces" && ./deploy/setup.sh && $(PY) -m isthmus lab demo

test: ## every test: lint, types, unit, kernel, lab
	@./deploy/need-root.sh "make test builds network namespaces" && ./deploy/setup.sh && ./deploy/test.sh

unit: setup ## unit tests only, no root needed
	@$(PY) -m pytest tests/unit -q -n 2

bpf: setup ## programs run in the kernel
	@if compgen -G 'tests/bpf/test_*.py' > /dev/null; then $(PY) -m pytest tests/bpf -q; else echo "no BPF programs yet"; fi

lab: setup ## real agents in namespaces
	@$(PY) -m pytest tests/lab -q

guest: setup ## what needs the guest kernel
	@if compgen -G 'tests/guest/test_*.py' > /dev/null; then $(PY) -m pytest tests/guest -q; else echo "no guest tests yet"; fi

bench: ## ratios against the direct connection and against peers, in one run
	@./deploy/need-root.sh "make bench builds network namespaces" && ./deploy/setup.sh && $(PY) -m bench

fmt: setup ## format
	@.venv/bin/ruff format -q . && .venv/bin/ruff check -q --fix --exit-zero .

lint: setup ## style, and the order of the rooms
	@.venv/bin/ruff format -q --check . && .venv/bin/ruff check -q .
	@.venv/bin/lint-imports > build/imports.log || { cat build/imports.log; exit 1; }

type: setup ## mypy, strict
	@.venv/bin/mypy

clean: ## remove what was built here
	@rm -rf .venv build
