"""``python -m mutoscope``: the form of the command that torchrun needs."""

from mutoscope.cli import main

if __name__ == "__main__":
    main()
