# Everything a developer runs. `make` alone lists the targets.
#
# Set-up goes into .venv; PYTHON=<interpreter> uses an existing environment instead and installs
# nothing. TORCH=<version> builds and tests with another torch, in a folder of its own.

TORCH  ?= 2.14.1
PYTHON ?=
JOBS   ?= $(shell nproc)
WERROR ?= OFF
CUDA   ?= AUTO
CMAKE_ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
ROOT := $(CURDIR)
DEFAULT_TORCH := 2.14.1

# The environment. A stamp in it says that it holds what pyproject.toml asks for.
ifeq ($(PYTHON),)
  VENV := .venv$(if $(filter $(DEFAULT_TORCH),$(TORCH)),,-$(TORCH))
  PY := $(ROOT)/$(VENV)/bin/python
  ID := torch-$(TORCH)
  ENVIRONMENT := $(VENV)/.torch_selfattn-$(TORCH)
  DEMO_ENVIRONMENT := $(ENVIRONMENT)-demo
else
  PY := $(shell command -v $(PYTHON))
  ifeq ($(PY),)
    $(error PYTHON=$(PYTHON) is not an interpreter)
  endif
  # PY's scripts may be shims; ID names its torch.
  ID := $(shell $(PY) -c 'import sys; from importlib.metadata import version; \
          print("torch-%s-py%d.%d" % (version("torch"), *sys.version_info[:2]))' \
          2> /dev/null || echo torch-missing)
  ENVIRONMENT := build/$(ID)/environment
endif
export PATH := $(dir $(PY)):$(PATH)

# The default build is in place: the checkout is importable. Any other has a folder of its own, with
# the Python sources linked into it.
BUILD := build/$(ID)
ifeq ($(ID),torch-$(DEFAULT_TORCH))
  PYTHONPATH_DIR := $(ROOT)
else
  PYTHONPATH_DIR := $(ROOT)/$(BUILD)/python
endif
PREFIX := $(PYTHONPATH_DIR)/torch_selfattn
# From there: `python -m` puts the current folder first in the path.
RUN := cd $(PYTHONPATH_DIR) && PYTHONPATH=$(PYTHONPATH_DIR) $(PY)
DEMO := cd $(PYTHONPATH_DIR)/examples && PYTHONPATH=$(PYTHONPATH_DIR) $(PY) -m pronounce.demo

CPP_FILES = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

##@ Use
.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nOptions: TORCH=<version> (now %s)  PYTHON=<interpreter>  JOBS=<n>  CUDA=AUTO|ON|OFF  WERROR=ON|OFF\n' '$(TORCH)'

.PHONY: demo
demo: build $(DEMO_ENVIRONMENT) ## train, evaluate, export and run the pronunciation model (two to five minutes)
	@$(DEMO) $(ARGS)

.PHONY: demo-full
demo-full: build $(DEMO_ENVIRONMENT) ## the same, trained longer (about an hour on 2 cores; resumable)
	@$(DEMO) --recipe full $(ARGS)

.PHONY: bench
bench: build ## measure against PyTorch; ARGS="--op … --set …" chooses
	@$(RUN) $(ROOT)/benchmarks/bench.py $(ARGS)

##@ Develop
.PHONY: build
build: $(BUILD)/build.ninja stage ## compile, and install into the package folder
	@cmake --build $(BUILD) --target install -j $(JOBS)

.PHONY: test
test: build ## Python and C++ tests, without the slow ones; sets up everything it needs
	@tools/run_tests.sh quick $(BUILD) $(PY) $(PYTHONPATH_DIR) $(JOBS) $(ARGS)

.PHONY: test-slow
test-slow: build ## the slow ones: other projects, examples, CUDA kernels under race detector and sanitizers
	@cmake --build $(BUILD) --target slow_tests -j $(JOBS)
	@tools/run_tests.sh slow $(BUILD) $(PY) $(PYTHONPATH_DIR) $(JOBS) $(ARGS)

.PHONY: lint
lint: $(BUILD)/build.ninja ## formatting, static analysis, types and the rules of the source tree
	@$(PY) tools/lint.py $(BUILD) $(ARGS)

.PHONY: format
format: $(ENVIRONMENT) ## rewrite all sources in the project's format
	@$(PY) -m ruff check --fix-only -q . && $(PY) -m ruff format -q .
	@clang-format -i $(CPP_FILES)

.PHONY: docs
docs: build ## the API reference in build/api; checks links and runs the examples of all documents
	@$(PY) tools/check_docs.py
	@$(RUN) -m sphinx -W --keep-going -q -b html $(ROOT)/docs/api $(ROOT)/build/api
	@$(RUN) -m pytest -c $(ROOT)/pyproject.toml --rootdir $(ROOT) $(ROOT)/tests/python/test_docs.py

.PHONY: ways
ways: build ## the README's table of operators and ways in, from the tests that show it
	@cd $(BUILD) && PYTHONPATH=$(PYTHONPATH_DIR) $(PY) -m pytest -c $(ROOT)/pyproject.toml --rootdir $(ROOT) \
	  -q -n $(JOBS) -m way --ways ways.json $(ROOT)/tests/python
	@$(PY) tools/ways_table.py $(BUILD)/ways.json --update README.md

.PHONY: clean
clean: ## remove what was built; the environments stay
	rm -rf build dist *.egg-info torch_selfattn/{lib,include,share} torch_selfattn/_C*.so

##@ Check deeper
.PHONY: test-asan
test-asan: $(ENVIRONMENT) ## all tests with the library under AddressSanitizer and UBSan
	@tools/run_sanitized.sh address,undefined build/$(ID)-asan $(PY) $(JOBS) $(ARGS)

.PHONY: test-tsan
test-tsan: $(ENVIRONMENT) ## the CPU kernels under ThreadSanitizer
	@tools/run_sanitized.sh thread build/$(ID)-tsan $(PY) $(JOBS) $(ARGS)

.PHONY: test-wheel
test-wheel: $(ENVIRONMENT) ## an sdist and its wheel; all Python tests where that wheel is installed
	@CMAKE_ARGS="-DTORCH_SELFATTN_CUDA=$(CUDA) $(CMAKE_ARGS)" tools/test_wheel.sh $(PY) $(BUILD)-wheel $(TORCH) $(JOBS) $(ARGS)

.PHONY: gpu-check
gpu-check: build ## on a machine with a GPU: tests, compute-sanitizer, benchmarks
	@cmake --build $(BUILD) --target gpu_tests -j $(JOBS)
	@$(RUN) $(ROOT)/tools/gpu_check.py --build $(ROOT)/$(BUILD) $(if $(OUT),--out $(abspath $(OUT))) $(ARGS)

# How the above get what they need.

CONFIGURE = cmake -GNinja -S . -B $(BUILD) -DPython_EXECUTABLE=$(PY) \
  -DCMAKE_INSTALL_PREFIX=$(PREFIX) -DCMAKE_INSTALL_MESSAGE=NEVER -DTORCH_SELFATTN_PYTHON=ON -DTORCH_SELFATTN_TESTS=ON \
  -DTORCH_SELFATTN_CUDA=$(CUDA) -DTORCH_SELFATTN_WERROR=$(WERROR) $(CMAKE_ARGS)

$(BUILD)/build.ninja: $(BUILD)/options $(ENVIRONMENT)
	@$(CONFIGURE)
	@touch $@

# Changes when the configure command does.
$(BUILD)/options: FORCE
	@mkdir -p $(@D) && echo '$(CONFIGURE)' | cmp -s - $@ || echo '$(CONFIGURE)' > $@

.PHONY: FORCE
FORCE:

.PHONY: stage
stage: | $(ENVIRONMENT)
	@tools/stage.sh $(PYTHONPATH_DIR)

ifeq ($(PYTHON),)
$(ENVIRONMENT): pyproject.toml | build/.system-packages
	@tools/make_environment.sh $(VENV) $(TORCH)
	@touch $@

$(DEMO_ENVIRONMENT): examples/pronounce/requirements.txt $(ENVIRONMENT)
	@$(PY) -m pip install -q -r $<
	@touch $@
else
$(ENVIRONMENT): pyproject.toml | build/.system-packages
	@$(PY) tools/check_environment.py
	@mkdir -p $(@D) && touch $@
endif

build/.system-packages:
	@mkdir -p build
	@tools/system_packages.sh
	@touch $@
