"""`python -m kvrelay`: the supervisor starts its processes so, whatever PATH says."""

import sys

from kvrelay.cli import main

if __name__ == "__main__":
    sys.exit(main())
