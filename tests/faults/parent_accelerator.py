"""A program: an engine in a process of its own, and how often each process asked for the device.

STAND_IN='["cuda", {}]' python parent_accelerator.py MODEL
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from accelerator_stand_in import StandIn

_NAME, _FAULTS = json.loads(os.environ["STAND_IN"])
_STAND_IN = StandIn(_NAME, **_FAULTS)
_STAND_IN.install()


def main() -> None:
    """Prints what this process asked of the driver, while another one computed."""
    from quire import LLM, SamplingParams

    settings = {"dtype": "float32", "max_model_len": 128, "cache_memory_bytes": 1 << 21}
    with LLM(sys.argv[1], device=_NAME, has_own_process=True, **settings) as llm:
        params = SamplingParams(max_tokens=4, detokenize=False, ignore_eos=True)
        prompt = {"prompt_token_ids": [5, 6, 7]}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        made = len(output.outputs[0].token_ids)
    sys.stdout.write(json.dumps({"made": made, "asked": _STAND_IN.machine.num_asked}))


if __name__ == "__main__":
    main()
