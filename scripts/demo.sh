#!/usr/bin/env bash
# Quantize the built-in networks of both tracks on the built-in digits; arguments go on to both command lines.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv ""
"$PYTHON" -m logart_cnn.main "$@"
"$PYTHON" -m logart_vit.main --optimize "$@"
