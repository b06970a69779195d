"""Generates with a model of random weights: CONFIG TYPE PROMPT_TOKENS [PRECISION].

Prints tokens/s as JSON.
"""

from __future__ import annotations

import json
import sys

from bases import load
from common import peak_gb

import pyloss
from pyloss import measuring


def main(config: str, stored_type: str, prompt: int, precision: str = "float32") -> None:
    pyloss.set_matmul_precision(precision)
    reading, generating = measuring.generation_speed(load(config, stored_type), prompt)
    found = {"prompt_tokens_per_s": reading.best, "tokens_per_s": generating.best}
    print(json.dumps({**found, "peak_gb": peak_gb()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
