# Every target sets up what it needs: Python 3.10 or newer, make and a C++ compiler are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# files are of very different length: a worker without work takes tests over from another
WORKERS := --numprocesses auto --maxprocesses 8 --dist worksteal
# the machine with a GPU: what decides whether kernels that were compiled here are found there
GPU_VENV := build/gpu-venv
GPU_INSTALLED := $(GPU_VENV)/.installed
GPU_PACKAGES := torch==2.11.0 triton==3.6.0 transformers==5.17.0

.PHONY: demo test quick ext lint docs kernels-report tables gpu gpu-kit gpu-dry-run clean

demo: $(INSTALLED)
	$(BIN)/xclip-fast demo

# all of them, or with CHANGED=main those that the diff since main needs
test: $(INSTALLED)
	$(BIN)/python $(if $(CHANGED),tests/changed.py $(CHANGED),-m pytest tests) $(WORKERS)

# for the loop of a developer: see CONTRIBUTING.md
quick: $(INSTALLED)
	$(BIN)/python -m pytest tests --quick $(WORKERS)

# everything in csrc/, the CUDA part where nvcc is, no GPU needed; a failure is an error
ext: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" XCLIP_FAST_BUILD_EXT=1 $(BIN)/python setup.py --quiet build_ext --inplace --force

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the pages into build/docs; a link that leads nowhere is an error
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

kernels-report: $(INSTALLED)
	$(BIN)/python -m benchmarks.compile_gate

# the tables and figures of the README and docs/, from benchmarks/results
tables: $(INSTALLED)
	$(BIN)/python -m benchmarks tables

# on a machine with one NVIDIA GPU, with its own Python and without network: benchmarks/gpu/README.md
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(DEADLINE),--deadline $(DEADLINE)) $(PART)

# what a borrowed GPU's first minutes would go to, made without a GPU: PYTHON is of the version that machine has
gpu-kit: $(GPU_INSTALLED)
	PATH="$(CURDIR)/$(GPU_VENV)/bin:$$PATH" $(GPU_VENV)/bin/python -m benchmarks.gpu.kit

# everything of benchmarks/gpu without a GPU: both windows on a stand-in driver, the parts in tiny shapes on the CPU
gpu-dry-run: $(INSTALLED) $(GPU_INSTALLED)
	for window in check figures; do \
		$(GPU_VENV)/bin/python -m benchmarks.gpu --window $$window --dry-run --seconds 3600 --out build/gpu-dry-run || exit 1; \
	done
	$(BIN)/python -m benchmarks.gpu --dry-run --out build/gpu-dry-run $(PART)

$(GPU_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet $(GPU_PACKAGES) einops ninja pybind11 pytest pytest-timeout regex ftfy \
		rich safetensors setuptools wheel 'numpy<2.4'
	XCLIP_FAST_BUILD_EXT=0 $(GPU_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "xclip_fast needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[bench,cli,dev,docs,openclip,train,video]'
	# pip builds without torch; this takes half a minute, and without a compiler it says so and goes on
	-PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -f xclip_fast/*.so xclip_fast/*.so.sources
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
