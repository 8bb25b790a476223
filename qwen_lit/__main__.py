"""``python -m qwen_lit``, the same as ``qwen-lit``."""

import sys

from qwen_lit.front import main

if __name__ == "__main__":
    sys.exit(main())
