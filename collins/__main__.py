"""`python -m collins`: see `collins.offload.cli`."""

import os
import sys

from collins.offload.cli import main

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan downloads nothing; transformers reads this when it is imported
    sys.exit(main())
