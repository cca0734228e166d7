"""`python -m torchdeq_ep` is the command `torchdeq-ep`."""

import sys

from torchdeq_ep.cli import main

if __name__ == "__main__":
    sys.exit(main())
