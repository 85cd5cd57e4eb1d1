#!/usr/bin/env bash
# Quantize the built-in network on the built-in digits; arguments go on to the command line.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv ""
"$PYTHON" -m logart_cnn.main "$@"
