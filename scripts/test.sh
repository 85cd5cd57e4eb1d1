#!/usr/bin/env bash
# Lint, type check, import rules and the whole default test run on two cores; arguments go on to pytest.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
use_venv test,report,docs
cd "$PROJECT"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-logo
NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --strict --quiet --site-dir build/site
"$PYTHON" -m pytest -q -n 2 --dist worksteal "$@"
