"""The system prompt that all records of a data set share: remembered in `adapter_config.json`, so
that prompts can have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyloss.errors import FormatError

KEY = "system_prompt"


def remembered(config: Mapping[str, Any] | None, dataset: Any) -> dict[str, Any] | None:
    """An adapter's configuration with the system prompt that `dataset` shares.

    Without one the key is left out. A dataset of somebody else's, which does not say it, leaves the
    key as it is.
    """
    if config is None or not callable(shared := getattr(dataset, KEY, None)):
        return None if config is None else dict(config)
    prompt = shared()
    others = {key: value for key, value in config.items() if key != KEY}
    return others if prompt is None else {**others, KEY: prompt}


def system_prompt_of(config: Mapping[str, Any] | None) -> str | None:
    """The system prompt in an adapter's configuration, if there is one."""
    return None if config is None else config.get(KEY)


def checked(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The part of a configuration read from `source` that is the system prompt; FormatError where
    it is no text.
    """
    prompt = config.get(KEY)
    if prompt is not None and not isinstance(prompt, str):
        raise FormatError(source, KEY, f"expected text, got {prompt!r:.80}")
    return {} if prompt is None else {KEY: prompt}
