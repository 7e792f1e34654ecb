# `make demo` and `make test` do all of the set-up: an environment in .venv with the pinned set of constraints.txt.
#   make demo PYTHON=python3.12      another interpreter
#   make demo ARGS="--tokens 2048"   options of the command
#   make test ARGS="-k codebook"     options of pytest
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
NEWEST := 5.24.0
NEWEST_TRITON := 3.9.0
VERSION ?= $(if $(filter test-triton,$(MAKECMDGOALS)),$(NEWEST_TRITON),$(NEWEST))
HOST = $(VENV)/hosts/transformers-$(VERSION)
TRITON = $(VENV)/hosts/triton-$(VERSION)
VLLM := $(VENV)/hosts/vllm-0.33.0
VLLM_SET := $(addprefix tests/engines/vllm/environment/,create.py requirements.txt vllm.txt)
RAY := $(VENV)/hosts/ray
RAY_SET := tests/cli/batch/ray.txt
PYTHON311 ?= python3.11
SUITES ?= tests/cache tests/presses tests/pipelines tests/conformance
KERNELS ?= tests/kernels tests/cache/paged/test_steps.py
SET := pyproject.toml constraints.txt

# The folder kernels/ must never be taken for Hugging Face's package of that name: keep this directory off sys.path.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test test-newest test-transformers test-triton test-combinations test-vllm test-ranks test-ray families test-gpu check format docs docs-serve clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      set up, fetch the default model, ask it about a book over compressed caches"
	@echo "make test      set up, run every test that needs no GPU"
	@echo "make test-newest  the suites of cache, presses and pipelines on transformers $(NEWEST)"
	@echo "make test-triton  the kernels' tests on triton $(NEWEST_TRITON), or VERSION=3.6.0"
	@echo "make test-combinations  the kernels compiled for the combinations that \`make test\` leaves out"
	@echo "make test-vllm    the tests of the plugin in the engine of vLLM on a CPU; needs Linux on x86_64 and Python 3.11"
	@echo "make test-ranks   the tests of several processes that share a model"
	@echo "make test-ray  the tests of \`quantpress batch\` on a Ray cluster of this machine"
	@echo "make test-gpu  set up, run the tests that need a CUDA device"
	@echo "make check     format, lint, strict types, then the tests"
	@echo "make format    rewrite the sources in the project's format"
	@echo "make docs      build the site strictly into build/site: every link and every docstring of the API is checked"
	@echo "make docs-serve  the same, shown at http://127.0.0.1:8000 and built again when a page changes"
	@echo "make clean     remove .venv and everything that was built"

demo: $(VENV)/.ready
	$(BIN)/python -m quantpress demo $(ARGS)

# Tests as pytest rewrites them are kept beside their sources: else each worker does it again, a third of collection.
test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu and not ranks and not combination" $(ARGS)

# The same suites on another version of transformers, in an environment of its own over the pinned one.
test-transformers: $(HOST)/.ready
	OMP_NUM_THREADS=1 $(HOST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(SUITES) $(ARGS)

# Record which families of models are packed on each tested version; docs/versions.md has the table.
families: $(VENV)/.ready-test $(foreach one,5.17.0 $(NEWEST),$(VENV)/hosts/transformers-$(one)/.ready)
	for python in $(BIN)/python $(foreach one,5.17.0 $(NEWEST),$(VENV)/hosts/transformers-$(one)/bin/python); do \
		QUANTPRESS_RECORD_FAMILIES=1 $$python -m pytest -q tests/pipelines/test_families.py -k what_the_page || exit 1; done
	$(BIN)/python docs/build.py tables

test-newest:
	@$(MAKE) --no-print-directory test-transformers VERSION=$(NEWEST)

# Every kernel interpreted, and compiled for GPUs that need not be here, by another version of triton.
test-triton: $(TRITON)/.ready
	OMP_NUM_THREADS=1 $(TRITON)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(KERNELS) $(ARGS)

# Kernels compiled for GPUs that need not be here, for what `make test` does not compile them for: minutes of processor time.
test-combinations: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m combination tests/kernels tests/benchmarks $(ARGS)

# The engine of vLLM on a CPU, in an environment with pins of its own. One process: each test looks into the engine.
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m "not gpu" tests/engines $(ARGS)

# Two and four processes that share a model, on the CPU, or on GPUs where there is one for each.
test-ranks: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "ranks and not gpu" tests/ranks $(ARGS)

# One process: each test starts a cluster, with a worker on each of two cores.
test-ray: $(RAY)/.ready
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/cli/batch $(ARGS)

test-gpu: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m gpu $(ARGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p quantpress
	@$(MAKE) --no-print-directory test

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only --exit-zero .

docs: $(VENV)/.ready-docs
	$(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.ready-docs
	$(BIN)/python -m mkdocs serve $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras; a larger set is also every smaller one.
$(VENV)/.ready: $(SET)
	$(call install,.[kvpress])
	@touch $@

$(VENV)/.ready-test: $(SET)
	$(call install,.[test])
	@touch $@ $(VENV)/.ready

$(VENV)/.ready-docs: $(SET)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The site needs Python 3.11 or later." \
		"Name another one: make docs VENV=.venv-docs PYTHON=python3.12" >&2; exit 1; }
	$(call install,.[docs])
	@touch $@ $(VENV)/.ready

$(VENV)/.ready-dev: $(SET)
	$(call install,.[dev])
	@touch $@ $(VENV)/.ready-test $(VENV)/.ready-docs $(VENV)/.ready

# pip says that quantpress[kvpress] asks for an older transformers, and goes on.
$(VENV)/hosts/transformers-%/.ready: $(VENV)/.ready-test
	$(call overlay,transformers==$*)
	@touch $@

# The interpreter of triton 3.6 fails with numpy 2.4.
$(VENV)/hosts/triton-%/.ready: $(VENV)/.ready-test
	$(call overlay,triton==$* $(if $(filter 3.6.%,$*),'numpy<2.4'))
	@touch $@

$(RAY)/.ready: $(VENV)/.ready-test $(RAY_SET)
	$(call overlay,--requirement $(RAY_SET))
	@touch $@

$(VLLM)/.ready: pyproject.toml $(VLLM_SET)
	@command -v "$(PYTHON311)" >/dev/null || { echo "vLLM's environment is pinned for Python 3.11, and there is no" \
		"'$(PYTHON311)' here. Name one: make test-vllm PYTHON311=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON311)" $(firstword $(VLLM_SET)) $(@D)
	@touch $@

# An environment over the pinned one, with these packages instead.
define overlay
rm -rf $(@D) && $(BIN)/python -m venv --without-pip $(@D)
parent=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
own=$$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
echo "import site; site.addsitedir('$$parent')" > "$$own/parent.pth"
$(@D)/bin/python -m pip install --quiet $(1)
endef

define install
@command -v "$(PYTHON)" >/dev/null || { echo "quantpress needs Python 3.10 or later, and there is no '$(PYTHON)' here." \
	"Name another one: make PYTHON=/path/to/python ..." >&2; exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "quantpress needs Python 3.10 or later," \
	"and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
$(BIN)/python -m pip install --constraint constraints.txt --editable "$(1)"
endef
