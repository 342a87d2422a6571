"""`python -m proxy.cli`: the command line without an installed script."""

from proxy.cli import main

if __name__ == "__main__":
    main()
