# Two commands on a fresh machine with Python 3.10+ and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs

# On a machine with an NVIDIA GPU a torch that is already installed is used as it is; elsewhere it is pinned.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_GPU),yes)
TORCH := torch>=2.8
VENV_FLAGS := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
else
TORCH := torch==2.13.0
endif

.PHONY: help install demo test lint format bench gpu clean
help:
	@echo "make demo    stream a video to $(OUT)/demo.mp4 and print its latency table"
	@echo "make test    all tests (those that need a GPU run where there is one)"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make format  let the formatters rewrite the files"
	@echo "make bench   benchmarks of this machine into bench/results/"
	@echo "make gpu     on a machine with an NVIDIA GPU: build, GPU tests, sanitizer, benchmarks"

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[wan,train,bench,dev]'
	@touch $@
install: $(VENV)/.installed

demo: install
	@mkdir -p $(OUT)
	$(BIN)/cfpp generate --random-weights --dtype float32 --prompt "a lighthouse in a storm" --output $(OUT)/demo.mp4
	@echo "The weights are random, so the film is noise; the stream, its timing and the file are real."

test: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: install
	$(BIN)/python -m cfpp_rt.bench.bench_kv_update
	$(BIN)/python -m cfpp_rt.bench.bench_kv_dequantize
	$(BIN)/python -m cfpp_rt.bench.bench_pointwise
	$(BIN)/python -m cfpp_rt.bench.bench_block_attention
	$(BIN)/python -m cfpp_rt.bench.bench_call_overhead
	$(BIN)/python -m cfpp_rt.bench.bench_rollout
	$(BIN)/python -m cfpp_rt.bench.bench_long_rollout

gpu: export CFPP_BUILD = cuda
gpu: install
	$(BIN)/python -m cfpp_rt.bench.gpu $(if $(OUT_GPU),--out $(OUT_GPU))

clean:
	rm -rf $(VENV) build *.egg-info $(OUT)
	find . -name '*.so' -path './cfpp_rt/*' -delete
