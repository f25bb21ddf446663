"""A process of a run that several share, started by torchrun: settings as JSON by the names of their folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from xclip_fast.train import train

for name, settings in json.loads(sys.argv[1]).items():
    train(settings, Path(sys.argv[2]) / name)
