# The one door to everything a developer or a first-time user does. `make` alone prints the list.
# Files .venv/.made, .venv/.runtime, .venv/.dev and .venv/.loadtest mark what is installed, so a second `make run` starts at once.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
ARGS ?=

.PHONY: help run dev test check format proto proto-check conf lock bench ceiling vm clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(VENV)/.runtime ## install into .venv and start ashd (options: make run ARGS="--port 4300")
	$(BIN)/ashd up $(ARGS)

dev: $(VENV)/.dev ## install the tools for tests and checks

test: $(VENV)/.dev ## the tests (one: make test ARGS="-k config")
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev proto-check ## format, lint, types, rooms, freshness of generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

PROTOS := $(wildcard proto/ashd/wire/v1/*.proto)
SERVICES := $(shell grep -l '^service ' $(PROTOS))
PROTOC := PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto
GENERATE = $(PROTOC) --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS) && \
	$(PROTOC) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICES)

proto: $(VENV)/.dev ## generate ashd/wire/v1 from proto/
	$(call GENERATE,.)

proto-check: $(VENV)/.dev
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call GENERATE,$$fresh) && \
	for file in $$fresh/ashd/wire/v1/*; do cmp -s "$$file" "ashd/wire/v1/$${file##*/}" || \
	{ echo "ashd/wire/v1/$${file##*/} is not what proto/ says: run make proto" >&2; exit 1; }; done

conf: $(VENV)/.runtime ## write conf/*.yaml from ashd/config/schema.py
	$(BIN)/python -m ashd.config.sample conf

lock: $(VENV)/.dev ## pin the newest dependencies that pyproject.toml allows
	$(PIP) install pip-tools
	for set in runtime:postgres dev:postgres,dev loadtest:postgres,loadtest; do \
	  { echo '# Made from pyproject.toml by `make lock`; do not edit.'; \
	    $(BIN)/pip-compile --quiet --upgrade --allow-unsafe --no-emit-index-url --no-emit-find-links --no-annotate \
	      --no-header --strip-extras $$(echo "$${set#*:}" | tr , '\n' | sed 's/^/--extra /') -o - pyproject.toml; \
	  } > "requirements/$${set%%:*}.lock" || exit 1; done

bench: $(VENV)/.dev ## latency of create and message against a running ashd (ARGS="--url http://127.0.0.1:4100")
	$(BIN)/python loadtest/roundtrip.py $(ARGS)

ceiling: $(VENV)/.loadtest ## sandboxes a host holds: every limit and agent, about 15 minutes (ARGS="--use-at-most 4GiB")
	$(BIN)/python loadtest/memory_ceiling.py --suite --capacity-page docs/capacity.md $(ARGS)

vm: $(VENV)/.dev ## the tests of limits and jails on cgroup v2, in a virtual machine (ARGS="--help")
	$(BIN)/python -m tests.vm $(ARGS)

clean: ## remove .venv and what tools left
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.made: .ci/venv
	.ci/venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.made requirements/runtime.lock pyproject.toml
	$(PIP) install -r requirements/runtime.lock
	$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.loadtest: $(VENV)/.runtime requirements/loadtest.lock
	$(PIP) install -r requirements/loadtest.lock
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements/dev.lock
	$(PIP) install -r requirements/dev.lock
	@touch $@
