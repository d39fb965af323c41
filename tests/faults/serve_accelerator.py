"""A program: the command `quire` on a machine with an accelerator that fails.

STAND_IN='["cuda", {"lost_at_launch": 60}]' python serve_accelerator.py ARGUMENTS-OF-QUIRE...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accelerator_stand_in import StandIn

# At import: the process of the engine, which this one starts anew, imports this file too.
_NAME, _FAULTS = json.loads(os.environ["STAND_IN"])
StandIn(_NAME, **_FAULTS).install()

if __name__ == "__main__":
    from quire.core.serving.cli import main

    main()
