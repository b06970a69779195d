"""`load` lies above models and adapters, which it both reads; what it takes is tested with mlx-lm's
names.
"""

import pyloss
from pyloss import models
from pyloss.loading import load


def test_load_has_one_home_and_two_more_names():
    assert models.load is pyloss.load is load
