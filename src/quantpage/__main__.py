"""`python -m quantpage`: the `quantpage` command."""

from quantpage.cli import main

if __name__ == "__main__":
    main()
