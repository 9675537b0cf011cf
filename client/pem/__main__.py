"""`python -m pem`: the command line."""

from pem.cli import main

if __name__ == "__main__":
    main()
