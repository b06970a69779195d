"""`pyloss distill`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pyloss import models
from pyloss.cli.commands.shared import Flags, move
from pyloss.cli.commands.training import fit
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.vocabularies import check_vocabularies
from pyloss.errors import size_text
from pyloss.io.console import say


def distill(flags: Flags) -> int:
    """`pyloss distill`: `pyloss train` with the probabilities of a teacher as targets."""
    return fit(flags, _objective)


def _objective(settings: SimpleNamespace, tokenizer: Any) -> Callable[..., Any]:
    """The loss against the teacher of the settings."""
    options = dict(settings.distillation or {})
    source = options.pop("teacher", None)
    if source is None:
        raise ValueError("no teacher: give --teacher, a model's folder, .gguf file or known name")
    teacher, known = models.load(source)
    check_vocabularies(tokenizer, known)
    move(teacher, settings.device)
    arrays = (*teacher.stored().values(), *teacher.parameters().values())
    size = size_text(sum(int(array.nbytes) for array in arrays))
    say(f"teacher {source}: {size} of weights, which are read from its file where they are used")
    return DistillationLoss(teacher, **options)
