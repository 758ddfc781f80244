"""``python -m mixbits.cli``: the same as ``mixbits``."""

import sys

from mixbits.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
