"""Optimizers by name."""

import pytest

from pyloss import optim


def test_unavailable_optimizers_are_refused_by_name():
    with pytest.raises(
        ValueError, match="'muon' is not available; allowed: adam, adamw, adam_atan2, lion, sgd"
    ):
        optim.build_optimizer("muon", 0.1)
    with pytest.raises(ValueError, match="adamw has no option 'beta'; allowed: betas, eps"):
        optim.build_optimizer("adamw", 0.1, {"beta": 1})
    with pytest.raises(ValueError, match=r"Adam: betas\[0\] is 1.5"):
        optim.build_optimizer("Adam", 0.1, {"betas": [1.5, 0.9]})
    assert isinstance(optim.build_optimizer("AdamW", 0.1, {"betas": [0.9, 0.98]}), optim.AdamW)
