"""``python -m qwen_lit``: exit 0 done, 1 the work failed, 2 bad usage or input, 130 and 143 on signals."""

import sys

from qwen_lit.cli import main

if __name__ == "__main__":
    sys.exit(main())
