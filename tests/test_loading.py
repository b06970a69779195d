"""`load` has one home, above models and adapters; test_mlx_names.py tests its arguments."""

import pyloss
from pyloss import models
from pyloss.loading import load


def test_load_has_one_home_and_two_more_names():
    assert models.load is pyloss.load is load
