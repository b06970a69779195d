"""Optimizers by name."""

import pytest

from pyloss import optim


def test_unavailable_optimizers_are_refused_by_name():
    allowed = "adam, adamw, adam_atan2, adafactor, lion, muon, sgd"
    with pytest.raises(ValueError, match=f"'adamx' is not available; allowed: {allowed}"):
        optim.build_optimizer("adamx", 0.1)
    with pytest.raises(ValueError, match="adamw has no option 'beta'; allowed: betas, eps"):
        optim.build_optimizer("adamw", 0.1, {"beta": 1})
    with pytest.raises(ValueError, match=r"Adam: betas\[0\] is 1.5"):
        optim.build_optimizer("Adam", 0.1, {"betas": [1.5, 0.9]})
    assert isinstance(optim.build_optimizer("AdamW", 0.1, {"betas": [0.9, 0.98]}), optim.AdamW)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_an_optimizer_is_found_by_its_name_and_by_its_class(name):
    kind = optim.OPTIMIZERS[name]
    for said in (name, name.upper(), kind.__name__):
        assert type(optim.build_optimizer(said, 0.1)) is kind
