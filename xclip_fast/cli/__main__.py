"""``python -m xclip_fast.cli`` is ``xclip-fast``."""

import sys

from xclip_fast.cli import main

sys.exit(main())
