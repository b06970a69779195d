"""Stored matrices: their formats, and `Weight` and `WeightStack` over the bytes of a file."""

from pyloss.weights.formats import FORMATS
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

__all__ = ["FORMATS", "Weight", "WeightStack"]
