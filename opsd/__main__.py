"""The command `opsd`, which says what to install where the packages that it needs are missing."""

import sys

import opsd


def main() -> int:
    if opsd.missing:
        print(f"opsd: needs {opsd.missing}, which is not installed: pip install 'opsd[train]'", file=sys.stderr)
        return 2
    from opsd.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
