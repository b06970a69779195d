"""llama.cpp's quantization of a GGUF file, by llama-cpp-python. Prints JSON: `seconds`."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time

import llama_cpp
from common import THREADS

#: llama.cpp's enum llama_ftype
FILE_TYPES = {
    "q2_k": 10, "q3_k_m": 12, "q4_k_s": 14, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25,
    "iq4_xs": 30,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "output", "type"):
        parser.add_argument(name)
    options = parser.parse_args()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype = THREADS, FILE_TYPES[options.type]
    begin = time.perf_counter()
    failed = llama_cpp.llama_model_quantize(
        os.fsencode(options.source), os.fsencode(options.output), ctypes.byref(parameters)
    )
    if failed:
        raise RuntimeError(f"llama.cpp did not quantize {options.source}")
    print(json.dumps({"seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
