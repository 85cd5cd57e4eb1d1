#!/usr/bin/env bash
# Quantize the built-in networks on the built-in digits, by learning and in closed form; see demo.py for arguments.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv ""
"$PYTHON" "$PROJECT/scripts/demo.py" "$@"
