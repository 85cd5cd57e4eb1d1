#!/usr/bin/env bash
# The report in a real headless Chromium, in an environment of its own; arguments go on to pytest. Playwright fetches
# its Chromium; where that fails, one that is installed is used (CHROMIUM names it, else `chromium` on PATH).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
explain
use_venv test,report .venv-browser playwright
"$PYTHON" -m playwright install chromium || echo "no Chromium of playwright's; trying an installed one" >&2
cd "$PROJECT"
"$PYTHON" -m pytest -q -m browser tests/logart/report/test_report_browser.py "$@"
