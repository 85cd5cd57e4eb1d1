#!/usr/bin/env bash
# The tests against the oldest supported releases, in an environment of their own; arguments go on to pytest.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
explain
PYTHONS=(python3.10 python3.11 python3.12 python3.13 python3) # the oldest as well
use_venv test .venv-oldest timm==1.0.3 torch==2.6.0 torchvision==0.21.0
cd "$PROJECT"
"$PYTHON" -m pytest -q tests/logart_vit tests/logart_cnn tests/logart "$@"
