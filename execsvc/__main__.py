"""`python -m execsvc`: runs the executor."""

import os
import sys

from execsvc.server import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
