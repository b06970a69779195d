"""Helpers of several commands: names of flags, the device, an adapter's base and system prompt."""

from __future__ import annotations

from typing import Any

import pyloss
from pyloss import models
from pyloss.distributed import Group, init
from pyloss.io.console import be_silent, say
from pyloss.io.files import user_path
from pyloss.models.files.gguf_writer import is_part_of
from pyloss.tuner.adapters.layout import adapter_place
from pyloss.tuner.data.system_prompt import system_prompt_of
from pyloss.tuner.run.run_folder import read_adapter_config
from pyloss.tuner.run.settings import DEFAULT_MODEL
from pyloss.tuner.run.stored import checkpoint_file

Flags = dict[str, Any]


def flag_text(name: str) -> str:
    """The flag of a key, as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def join(backend: str) -> Group:
    """The group of --distributed; on all ranks but the first one nothing is printed from now on."""
    group = init(backend)
    if group.rank():
        be_silent()
    return group


def move(model: Any, device: str | None) -> None:
    """Moves the model to the device of --device, if it is given."""
    if device:
        pyloss.to_device(model, device)


def base_of(adapter: str | None) -> str | None:
    """The model that an adapter's configuration names; None without an adapter or a name.

    FileNotFoundError if it is not here: of an absolute path only the last part is kept.
    """
    if adapter is None:
        return None
    saved = read_adapter_config(adapter_place(adapter)[0])
    name = saved.get("base_model_name_or_path" if "peft_type" in saved else "model")
    if not name or not isinstance(name, str):
        return None
    if name != DEFAULT_MODEL:
        try:
            models.resolve_model(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the adapter in {adapter} was trained over the model {name!r}, which is not "
                f"found from here; give its place as --model ({error})"
            ) from None
        say(f"model {name}, which the adapter was trained over")
    return name


def choose_model(flags: Flags) -> None:
    """Sets an unset --model: the one that the adapter was trained over, else the default."""
    flags["model"] = flags["model"] or base_of(flags.get("adapter_path")) or DEFAULT_MODEL


def say_system_prompt(model: Any) -> None:
    """Notes the adapter's system prompt, which the files of a fused model cannot hold."""
    if (prompt := system_prompt_of(getattr(model, "adapter_config", None))) is not None:
        say(
            "the adapter was trained with this system prompt, "
            f"which has to be given to the model: {prompt}"
        )


def refuse_source(name: str, flags: Flags) -> None:
    """Raises ValueError if the flag `name` would overwrite the model or the adapter."""
    target = user_path(flags[name]).resolve()
    for what, source in (("model", flags["model"]), ("adapter", flags.get("adapter_path"))):
        place = None if source is None else user_path(source).resolve()
        if what == "adapter" and source is not None and (file := checkpoint_file(source)):
            place = file.resolve()
        # A file of an adapter stands for its folder.
        if place is not None and (
            target in {place, *([place.parent] if what == "adapter" and place.is_file() else [])}
            or (flags.get("split_max_size") and is_part_of(place, target))
        ):
            raise ValueError(
                f"{flag_text(name)} {flags[name]} is the {what} itself: give another place"
            )
