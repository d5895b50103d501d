"""``python -m classfair`` is the ``classfair`` command."""

from classfair.cli import entry

if __name__ == "__main__":
    entry()
