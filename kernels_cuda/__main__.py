"""`python -m quire.kernels_cuda`: see `quire.kernels_cuda.survey`."""

from __future__ import annotations

import sys

from quire.kernels_cuda.survey import main

sys.exit(main(sys.argv[1:]))
