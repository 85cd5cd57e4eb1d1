#!/usr/bin/env bash
# Simulates the exported SystemVerilog with Icarus Verilog (Verilator lints it too where it is there). Neither comes from pip:
# install them with the system's packages, `apt-get install iverilog verilator` or `brew install icarus-verilog verilator`.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv test,report,docs
if [[ -z $HELP ]] && ! command -v iverilog >/dev/null; then
    echo "no Icarus Verilog found; expected iverilog on PATH (apt-get install iverilog)" >&2
    exit 2
fi
cd "$PROJECT"
"$PYTHON" -m pytest -q -m rtl tests/logart/export "$@"
