"""Switching a model's adapters off and on, without reading them again."""

from __future__ import annotations

from typing import Any

from pyloss.tuner.adapters.adapter import adapter_modules
from pyloss.tuner.adapters.full import is_full


class AdapterSwitch:
    """Takes a model's adapters off and puts them back.

    Attributes:
        on: whether the adapters are in the model.
    """

    def __init__(self, model: Any) -> None:
        """Raises ValueError for a model without adapters."""
        self.model, self.adapters, self.on = model, adapter_modules(model), True
        if is_full(getattr(model, "adapter_config", None)):
            raise ValueError(
                "full fine-tuning replaced the model's weights, which cannot be switched off"
            )
        if not self.adapters:
            raise ValueError("there is no adapter to switch off")

    def turn(self) -> None:
        """Switches the adapters off if they are on, and on if they are off."""
        self.on = not self.on
        for name, adapter in self.adapters.items():
            self.model.set_module(name, adapter if self.on else adapter.original())
