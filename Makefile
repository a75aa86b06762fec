# Two commands on a fresh machine with Python 3.10+ and a compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs

# On a machine with an NVIDIA GPU a torch that is already installed is used as it is. Elsewhere torch is pinned. PyPI's build
# for Linux brings gigabytes of CUDA libraries; PIP_EXTRA_INDEX_URL may name PyTorch's index of CPU builds to avoid them.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_GPU),yes)
TORCH := torch>=2.8
VENV_FLAGS := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
else
TORCH := torch==2.13.0
CORE_BUILD := cpu
# The CUDA module is compiled to find what does not compile or link; no GPU here runs it, so one architecture will do.
export CFPP_CUDA_ARCHS ?= 90a
endif
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help install demo test lint format bench world gpu clean
help:
	@echo "make demo    play the built-in world by script, to $(OUT)/demo.mp4, and print a latency table"
	@echo "make install everything that tests, linters and benchmarks need"
	@echo "make test    all tests (those that need a GPU run where there is one)"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make format  let the formatters rewrite the files"
	@echo "make bench   benchmarks of this machine, printed (--json FILE of each keeps rows)"
	@echo "make world   train the built-in world's student from nothing (hours)"
	@echo "make gpu     on a machine with an NVIDIA GPU: build, GPU tests, sanitizer, benchmarks"

# Two installations, one on top of the other: what the demo runs on, and everything that the tests and tools use.
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
$(VENV)/.core: $(SOURCES)
	@echo "[1/3] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@echo "[2/3] installing torch (the largest download)"
	@$(PIP) --no-compile '$(TORCH)'
	@# Compiled to bytecode on all cores, where pip would use one. Some of torch's files are for newer Pythons only.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib/*/site-packages/torch || true
	@echo "[3/3] compiling the kernels and installing cfpp_rt: half a minute on two cores; with CUDA kernels, minutes"
	@CFPP_BUILD=$(or $(CFPP_BUILD),$(CORE_BUILD),auto) $(PIP) -e '.[video]'
	@touch $@
$(VENV)/.full: $(VENV)/.core
	@echo "installing all extras; compiling the CUDA kernels where nvcc is found: minutes"
	@$(PIP) -e '.[wan,train,bench,dev]'
	@touch $@
install: $(VENV)/.full

DEMO = right*6,up*4,left*6,down*8,interact,right*10,down*6,left*12,up*10,interact,right*12,up*6,left*10,down*6,right*20,up*10,left*12,interact,down*10,right*12,up*12,left*20,down*8
demo: $(VENV)/.core
	@mkdir -p $(OUT)
	$(BIN)/cfpp generate --student world --actions "$(DEMO)" --output $(OUT)/demo.mp4 --sheet $(OUT)/demo.png
	@echo "Every frame after the first was made by the student: $(OUT)/demo.mp4, $(OUT)/demo.png. Play it: $(BIN)/cfpp play"

test: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench export
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: install
	$(BIN)/python -m cfpp_rt.bench.ops.kv_update
	$(BIN)/python -m cfpp_rt.bench.ops.kv_dequantize
	$(BIN)/python -m cfpp_rt.bench.ops.pointwise
	$(BIN)/python -m cfpp_rt.bench.ops.block_attention
	$(BIN)/python -m cfpp_rt.bench.ops.call_overhead
	$(BIN)/python -m cfpp_rt.bench.model.rollout
	$(BIN)/python -m cfpp_rt.bench.model.decode
	$(BIN)/python -m cfpp_rt.bench.model.camera --block 1
	$(BIN)/python -m cfpp_rt.bench.model.small_pass
	$(BIN)/python -m cfpp_rt.bench.model.dtypes
	$(BIN)/python -m cfpp_rt.bench.model.train
	$(BIN)/python -m cfpp_rt.bench.export.engine
	$(BIN)/cfpp bench --random-weights --model world
	$(BIN)/python -m cfpp_rt.bench.model.long_rollout

# The built-in world's student from nothing: stages ar, base and dmd. A run that was broken off goes on.
WORLD := $(OUT)/world
STAGE = $(BIN)/cfpp distill --config configs/world.yaml --out $(@D) $(if $(wildcard $(@D)/step-*),--resume)
world: $(WORLD)/dmd/student.safetensors
	$(BIN)/python -m cfpp_rt.world.pack --config configs/world.yaml --run $(<D) --steps 1000 250 --out cfpp_rt/world/weights
	$(BIN)/cfpp world-eval
$(WORLD)/ar/student.safetensors: | install
	$(STAGE) --stage ar
$(WORLD)/base/student.safetensors: $(WORLD)/ar/student.safetensors
	$(STAGE) --stage base --init $<
$(WORLD)/dmd/student.safetensors: $(WORLD)/ar/student.safetensors $(WORLD)/base/student.safetensors
	$(STAGE) --stage dmd --init $< --real $(WORLD)/base/student.safetensors

gpu: export CFPP_BUILD = cuda
gpu: install
	$(BIN)/python -m cfpp_rt.bench.gpu $(if $(OUT_GPU),--out $(OUT_GPU))

clean:
	rm -rf $(VENV) build *.egg-info $(OUT)
	find . -name '*.so' -path './cfpp_rt/*' -delete
