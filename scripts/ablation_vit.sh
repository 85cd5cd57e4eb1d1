#!/usr/bin/env bash
# The paper's ten rows: ablation_vit.sh [DATA [MODEL ...]], with BITS, SEEDS, ITERS, ... from the environment; see --help.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv ""
"$PYTHON" "$PROJECT/scripts/ablation.py" vit "$@"
