"""`python -m benchmarks.versions`: see run.py."""

import sys

from benchmarks.versions.run import main

if __name__ == "__main__":
    sys.exit(main())
