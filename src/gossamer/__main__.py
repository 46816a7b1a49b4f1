"""``python -m gossamer``: the command line."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]  # a file such as random.py in the working folder would be imported instead of Python's

from gossamer.cli.main import main

if __name__ == "__main__":
    main()
