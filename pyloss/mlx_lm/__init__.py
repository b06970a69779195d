"""mlx-lm's modules, by its paths, names, signatures and defaults, over pyloss.

A script for mlx-lm runs after two substitutions, `mlx_lm` -> `pyloss.mlx_lm` and `mlx.` ->
`pyloss.mlx.`. `names.py` lists what differs and what is missing; docs/coming_from_mlx.md is the
user's page. `python -m pyloss.mlx_lm.lora` and the others are mlx-lm's commands.
"""

from __future__ import annotations

from pyloss.mlx_lm.convert import convert
from pyloss.mlx_lm.generate import batch_generate, generate, stream_generate
from pyloss.mlx_lm.names import VERSION, absent
from pyloss.mlx_lm.utils import load

__version__ = VERSION

__all__ = ["__version__", "batch_generate", "convert", "generate", "load", "stream_generate"]

__getattr__ = absent(__name__)
