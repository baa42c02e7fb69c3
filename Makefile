# What a newcomer runs. Each target does all its own set-up, in .venv; 'make' alone lists them.
# VENV and PYTHON can be set on the command line, and EDET_CUDA, EDET_CUDA_ARCHS, … (docs/build.md) too.

VENV ?= .venv
# the first python that is new enough
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && command -v $$p && break; done)
PY := $(VENV)/bin/python
# what was set, for a wheel; it has all of them otherwise
WHEEL_CUDA_ARCHS := $(EDET_CUDA_ARCHS)
# one GPU architecture compiles in a minute, all of a wheel's in a quarter of an hour: set it to your GPU's
export EDET_CUDA_ARCHS ?= 90
CPP_FILES = $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh examples/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help demo test build lint format clean
.SUFFIXES:
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.extra-all build ## run EfficientDet-D0 on a photograph; writes a table, a plot and an image to demo/
	$(PY) -m edet.demo --output demo

test: $(VENV)/.extra-test ## run the whole test suite; also builds the emulation of the CUDA kernels
	@EDET_EMULATION=1 $(PY) setup.py --quiet build_ext --inplace
	$(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: test-peers
test-peers: $(VENV)-peers/.done build ## run the drop-in on the real effdet, in an environment of its own
	PYTHONPATH=.:python $(VENV)-peers/bin/python -W default -m pytest -W default tests/peers $(PEERS)

build: $(VENV)/.torch ## compile the op library (only what has changed)
	@$(PY) setup.py --quiet build_ext --inplace

.PHONY: bench-cpu
bench-cpu: $(VENV)/.extra-bench $(VENV)-peers/.done build ## time the models against other CPU runtimes; an hour or more
	$(PY) benchmarks/cpu.py $(BENCH)

.PHONY: bench-dropin
bench-dropin: $(VENV)-peers/.done build ## time the real effdet before and after edet.accelerate
	$(VENV)-peers/bin/python benchmarks/dropin.py $(BENCH)

.PHONY: gpu-check
gpu-check: ## with an NVIDIA GPU: build for it, test, sanitize and time the CUDA kernels; writes gpu-check/
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

.PHONY: gpu-model
gpu-model: $(VENV)/.extra-test ## predict the CUDA kernels' times from their machine code; needs nvcc, no GPU
	@EDET_EMULATION=1 EDET_CUDA=0 $(PY) setup.py --quiet build_ext --inplace
	PYTHONPATH=.:python $(PY) -m benchmarks.gpu_model $(GPU_MODEL)

.PHONY: docs
docs: $(VENV)/.extra-docs ## build/docs/index.html: the pages and the API reference; a broken link is an error
	PYTHONPATH=.:python $(PY) -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

# The library is compiled in build/, so that a second wheel takes seconds; what setuptools gathers starts empty.
.PHONY: wheel
wheel: export EDET_CUDA_ARCHS := $(WHEEL_CUDA_ARCHS)
wheel: $(VENV)/.extra-all $(VENV)/.extra-release ## dist/: a checked manylinux wheel and the sources; CUDA for all GPUs takes long
	rm -rf dist build/wheel build/lib build/bdist.*
	$(PY) -m build --no-isolation --sdist --wheel --outdir build/wheel
	PATH=$(abspath $(VENV)/bin):$$PATH $(PY) -m auditwheel repair --plat manylinux_2_28_$$(uname -m) \
	  --exclude libtorch.so --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(PY) -m twine check --strict dist/*
	$(PY) tests/build/try_wheel.py dist/*.whl

lint: $(VENV)/.extra-dev ## check style, types and formatting; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.extra-dev ## put Python and C++ sources in the project's format
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean: ## remove what the build made; the environment stays (rm -r .venv removes it)
	rm -rf build dist *.egg-info edet_kernels/libedet_kernels.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment, in three steps that are repeated only when their reason has changed.
$(PY):
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer was not found. Install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making the environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.torch: Makefile | $(PY)
	@echo "Installing torch 2.13.0 and the build tools"
	@$(PY) -m pip install --disable-pip-version-check torch==2.13.0 "setuptools>=77" "cmake>=3.24" ninja
	@touch $@

# effdet needs torchvision, which needs the torch of the same date: here the oldest that is supported.
$(VENV)-peers/.done: Makefile
	@echo "Making the environment $(VENV)-peers with effdet 0.4.1 (several gigabytes)"
	@$(PYTHON) -m venv $(VENV)-peers
	@$(VENV)-peers/bin/pip install --disable-pip-version-check --quiet torch==2.10.0 torchvision==0.25.0 effdet==0.4.1 onnx==1.23.2 onnxscript==0.7.2 pytest
	@touch $@

# Editable and without the library, which 'build' compiles.
$(VENV)/.extra-%: pyproject.toml $(VENV)/.torch
	@echo "Installing edet-kernels[$*]"
	@EDET_BUILD=0 $(PY) -m pip install --disable-pip-version-check --quiet --no-build-isolation --editable ".[$*]"
	@touch $@
