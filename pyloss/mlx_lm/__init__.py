"""mlx-lm's modules, by its paths, names, signatures and defaults, over pyloss.

A script for mlx-lm runs after two substitutions, `mlx_lm` -> `pyloss.mlx_lm` and `mlx.` ->
`pyloss.mlx.`. `names.py` lists what differs and what is missing; docs/coming_from_mlx.md is the
user's page. `python -m pyloss.mlx_lm.lora` and the others are mlx-lm's commands.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyloss.mlx_lm.names import VERSION, absent

if TYPE_CHECKING:
    from pyloss.mlx_lm.convert import convert
    from pyloss.mlx_lm.generate import batch_generate, generate, stream_generate
    from pyloss.mlx_lm.utils import load

__version__ = VERSION

__all__ = ["__version__", "batch_generate", "convert", "generate", "load", "stream_generate"]

_HOMES = {
    "batch_generate": "generate",
    "convert": "convert",
    "generate": "generate",
    "load": "utils",
    "stream_generate": "generate",
}
_absent = absent(__name__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        return _absent(name)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    """The package, whose functions keep their names when modules of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
