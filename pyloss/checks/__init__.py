"""Arguments as callers give them: numbers and arrays, checked."""
