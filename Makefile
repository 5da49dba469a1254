# Mooring. Two commands matter on a machine with nothing but Python >= 3.11 and make:
#
#     make demo    sets everything up, trains an unprotected and a moored adapter, shows them side by side
#     make test    sets everything up, runs the linters, the type checker and every test that is not slow
#
# Everything lands in .venv; `make clean-venv` removes it. The set-up is a no-op while requirements/ and the
# three pyproject.toml are unchanged.

SHELL   := /bin/sh
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.mooring-installed
PYTHON  ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# One thread per process: two OpenMP threads on a busy two-core machine spin on each other and a small UNet
# step takes 16 times as long. The server chooses its own thread count (MOORING_THREADS).
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST_ARGS ?=
# Whole files go to one worker, so that a file's tests share its servers; a worker needs 2 GB.
PYTEST_WORKERS ?= -n auto --maxprocesses=4 --dist loadfile

# uv does not read pip's settings: an index that pip was pointed at by its environment is handed on.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
export UV_HTTP_TIMEOUT ?= 180

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all go bench lint format proto requirements clean-venv

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with everything pinned and hashed

$(STAMP): requirements/bootstrap.txt requirements/dev.txt pyproject.toml clients/python/pyproject.toml kernels/pyproject.toml
	@test -n "$(PYTHON)" || { echo "Mooring needs Python >= 3.11 on the PATH (or: make PYTHON=/path/to/python3)." >&2; exit 1; }
	@echo "==> virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Python cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> uv, the installer"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@echo "==> pinned and hashed requirements (4.8 GB with CUDA libraries; minutes on a slow line)"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --require-hashes -r requirements/dev.txt
	@echo "==> mooring, mooring-kernels, mooring-server (editable)"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e clients/python -e kernels -e .
	@touch $@
	@echo "==> ready: $(BIN)/mooring --help"

demo: $(STAMP) ## train none and moored on the shipped photos, compare with the base (5 to 10 minutes on 2 cores)
	@$(BIN)/mooring demo

test: lint go ## linters, types, the Go client and every test that is not slow
	$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-all: lint go ## the same with the slow tests
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

# The Go client's tests start the server of .venv. Where Go is missing they are not run, and that is said: unless
# MOORING_TEST_GO=require, which continuous integration sets. The race detector needs a C compiler.
# Never from the cache (-count=1): Go cannot know that the server has changed.
go: $(STAMP) ## Go client: gofmt, vet, staticcheck, tests with the race detector
	@if cd clients/go && go list -m >/dev/null 2>&1; then \
		echo "==> Go client ($$(go env GOVERSION))"; \
		unformatted="$$(gofmt -l .)"; test -z "$$unformatted" || { echo "gofmt -w: $$unformatted" >&2; exit 1; }; \
		staticcheck="$$(cd ../.. && $(BIN)/python -m tools.protos staticcheck)" || exit 1; \
		for module in . examples/traced; do (cd $$module && go vet ./... && "$$staticcheck" ./...) || exit 1; done; \
		race=-race; command -v "$$(go env CC)" >/dev/null || race=; \
		test "$$race" || { echo "==> no C compiler: without the race detector"; test "$(MOORING_TEST_GO)" != require; } && \
		go test -count=1 $$race ./...; \
	elif [ "$(MOORING_TEST_GO)" = require ]; then \
		echo "MOORING_TEST_GO=require, and no Go that takes clients/go/go.mod is on the PATH" >&2; exit 1; \
	else \
		echo "==> no Go that takes clients/go/go.mod is on the PATH: the Go client's tests were NOT run"; \
	fi

lint: $(STAMP) ## ruff and mypy (buf lint and breaking-change check are tests)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy service/mooring_server kernels/mooring_kernels clients/python/mooring benchmarks

format: $(STAMP) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: ## list the benchmarks, and how to run each
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks

proto: $(STAMP) ## generate the Python and Go stubs from proto/
	$(BIN)/python -m tools.protos generate

requirements: $(STAMP) ## resolve requirements/*.in again into pinned, hashed files
	UV_CUSTOM_COMPILE_COMMAND="make requirements" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes requirements/bootstrap.in -o requirements/bootstrap.txt
	UV_CUSTOM_COMPILE_COMMAND="make requirements" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes requirements/dev.in -o requirements/dev.txt
	UV_CUSTOM_COMPILE_COMMAND="make requirements" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes requirements/runtime.in -c requirements/dev.txt -o requirements/runtime.txt

clean-venv: ## remove .venv
	rm -rf $(VENV)
