"""`python -m benchmarks.network`: see run.py."""

from benchmarks.network.run import main

if __name__ == "__main__":
    main()
