"""`python -m collins`: see `collins.offload.cli`."""

import sys

from collins.offload.cli import main

if __name__ == "__main__":
    sys.exit(main())
