"""`python -m logart.inspect`: what a packed file holds."""

from __future__ import annotations

from logart.packed.inspect import main

if __name__ == "__main__":
    raise SystemExit(main())
