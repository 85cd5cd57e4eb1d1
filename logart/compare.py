"""`python -m logart.compare`: packed files and runs on the same images."""

from __future__ import annotations

from logart.report.compare import main

if __name__ == "__main__":
    raise SystemExit(main())
