"""The system prompt that all records of a dataset share.

It is saved in `adapter_config.json`, so that prompts to the adapter can include it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyloss.errors import FormatError

KEY = "system_prompt"


def remembered(config: Mapping[str, Any] | None, dataset: Any) -> dict[str, Any] | None:
    """A copy of an adapter's configuration with the system prompt that `dataset` shares.

    The key is removed if the records share no system prompt. It stays unchanged if the dataset's
    class has no `system_prompt()`, as with a user's own class. None gives None.
    """
    if config is None or not callable(shared := getattr(dataset, KEY, None)):
        return None if config is None else dict(config)
    prompt = shared()
    others = {key: value for key, value in config.items() if key != KEY}
    return others if prompt is None else {**others, KEY: prompt}


def system_prompt_of(config: Mapping[str, Any] | None) -> str | None:
    """The system prompt in an adapter's configuration, or None."""
    return None if config is None else config.get(KEY)


def checked(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The system prompt's entry of a configuration read from `source`; {} if there is none.

    Raises `FormatError` if the system prompt is not a string.
    """
    prompt = config.get(KEY)
    if prompt is not None and not isinstance(prompt, str):
        raise FormatError(source, KEY, f"expected text, got {prompt!r:.80}")
    return {} if prompt is None else {KEY: prompt}
