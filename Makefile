# make env     .venv with tested versions, and the package compiled in place; repeated only when something changed
# make test    env, then the test suite          make test-triton   env, then the suite's Triton part under the interpreter
# make demo    env, then trains a small detector make bench         env, then the benchmarks
# make lint    env, ruff, mypy, clang-format        make clean         removes what these made
#
# PYTHON=python3.12 picks the interpreter. TORCH= (empty) takes the torch that the interpreter or .venv has already, with whatever
# versions of the rest fit it. Other switches: README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: env test test-triton demo bench lint clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
VENV := .venv
PY := $(VENV)/bin/python
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

env:
	@site=$(if $(TORCH),,--system-site-packages)
	if [ ! -x $(PY) ]; then
	  $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the tested versions need Python 3.11 or newer, got " + sys.version)'
	  $(PYTHON) -m venv $$site $(VENV)
	fi
	wanted="$(TORCH) $$(cat requirements/*.txt pyproject.toml | sha256sum)"
	if [ "$$(cat $(VENV)/.installed 2>/dev/null || true)" != "$$wanted" ]; then
	  rm -f $(VENV)/.installed $(VENV)/.compiled
	  $(if $(TORCH),$(PY) -m pip install "$(TORCH)",true)
	  # A venv made by the interpreter of another venv does not see that one's packages.
	  $(if $(TORCH),true,$(PY) -c 'import torch' 2>/dev/null) || $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_the_interpreter.pth"
	  # Every later install is held to the torch that is there, and to its Triton.
	  $(PY) -c 'import torch; print(f"torch=={torch.__version__}")' > $(VENV)/constraints.txt
	  cat requirements/base.txt requirements/demo.txt requirements/integrations.txt $(if $(TORCH),,| sed 's/==.*//') > $(VENV)/requirements.txt
	  $(PY) -m pip install -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt
	  $(PY) -m pip install --no-deps -r requirements/frameworks.txt
	  $(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -c $(VENV)/constraints.txt -r requirements/triton.txt
	  RSLOSS_NO_EXT=1 $(PY) -m pip install --no-build-isolation --no-deps --force-reinstall -e .
	  echo "$$wanted" > $(VENV)/.installed
	fi
	switches="$${RSLOSS_NO_EXT:-} $${RSLOSS_FORCE_CUDA:-} $${TORCH_CUDA_ARCH_LIST:-} $${DEBUG:-} $${CXX:-}"
	wanted="$$switches $$(find csrc setup.py rsloss_kernels/_build.py -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)"
	if [ "$$(cat $(VENV)/.compiled 2>/dev/null || true)" != "$$wanted" ]; then
	  rm -f $(VENV)/.compiled
	  # No library stays that the sources did not make.
	  if [ "$${RSLOSS_NO_EXT:-0}" != 0 ]; then rm -f rsloss_kernels/*.so; fi
	  $(PY) setup.py build_ext --inplace --force || { rm -f rsloss_kernels/*.so; exit 1; }
	  echo "$$wanted" > $(VENV)/.compiled
	fi

test: env
	@$(PY) -m pytest tests -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

# Triton decides at import whether it interprets or compiles, so this needs a run of its own.
test-triton: env
	@TRITON_INTERPRET=1 RSLOSS_TEST_BACKENDS=triton $(PY) -m pytest tests -n $(JOBS) --dist worksteal -k triton-cpu $(PYTEST_FLAGS)

# Threads that wait asleep: on a busy machine those that spin take the time of the others.
demo: env
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(PY) python/train_detector.py $(DEMO_FLAGS)

bench: env
	@$(PY) bench/run.py $(BENCH_FLAGS)

lint: env
	@$(PY) -m pip install -q -r requirements/lint.txt
	$(PY) -m ruff check .
	$(PY) -m mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror

clean:
	@rm -rf build dist *.egg-info rsloss_kernels/*.so $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
