"""`python -m collins`: see `collins.offload.cli`."""

import os
import sys

from collins.offload.cli import main

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a plan downloads nothing
    sys.exit(main())
