"""The names in docs/coming_from_peft.md and docs/coming_from_trl.md are PEFT's and TRL's."""

import dataclasses

import pytest
from named import codes, rows


def test_names_of_peft():
    peft = pytest.importorskip("peft", reason="reads PEFT's names (parity extra)")
    from peft.tuners.lora import LoraModel

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    owners = {"PeftModel": peft.PeftModel, "LoraModel": LoraModel}
    named = [name for row in rows("coming_from_peft.md", "PEFT") for name in codes(row[0])]
    assert len(named) > 40
    for name in named:
        owner, _, member = name.rpartition(".")
        home = owners[owner] if owner else peft
        assert name in fields or hasattr(home, member or name), f"PEFT has no {name}"


def test_names_of_trl():
    trl = pytest.importorskip("trl", reason="reads TRL's names, if it is installed")
    fields = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    named = [name for row in rows("coming_from_trl.md", "TRL") for name in codes(row[0])]
    assert len(named) > 40
    assert not [name for name in named if name not in fields]
