"""`python -m quire.kernels_triton`: see `quire.kernels_triton.survey`."""

from __future__ import annotations

import sys

from quire.kernels_triton.survey import main

sys.exit(main(sys.argv[1:]))
