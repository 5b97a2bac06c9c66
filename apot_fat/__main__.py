"""``python -m apot_fat``: the command ``apot-fat``."""

from apot_fat.commands import main

if __name__ == "__main__":
    main()
