"""Helpers of several commands: names of flags, the device, the adapter's system prompt."""

from __future__ import annotations

from typing import Any

import pyloss
from pyloss.io.console import say
from pyloss.tuner.data.system_prompt import system_prompt_of

Flags = dict[str, Any]


def flag_text(name: str) -> str:
    """The flag of a key, as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def move(model: Any, device: str | None) -> None:
    """Moves the model to the device of --device, if it is given."""
    if device:
        pyloss.to_device(model, device)


def say_system_prompt(model: Any) -> None:
    """Notes the adapter's system prompt, which the files of a fused model cannot hold."""
    if (prompt := system_prompt_of(getattr(model, "adapter_config", None))) is not None:
        say(
            "the adapter was trained with this system prompt, "
            f"which has to be given to the model: {prompt}"
        )
