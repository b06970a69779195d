"""mlx_lm.tuner.callbacks."""

from __future__ import annotations

from pyloss.mlx_lm.names import absent
from pyloss.tuner.callbacks import (
    SERVICES,
    Info,
    SwanLabCallback,
    TrainingCallback,
    WandBCallback,
    get_reporting_callbacks as callbacks_of,
)

SUPPORT_CALLBACK = SERVICES

__all__ = [
    "SUPPORT_CALLBACK",
    "SwanLabCallback",
    "TrainingCallback",
    "WandBCallback",
    "get_reporting_callbacks",
]

__getattr__ = absent(__name__)


def get_reporting_callbacks(
    report_to: str | None = None,
    project_name: str | None = None,
    log_dir: str | None = None,
    config: Info | None = None,
) -> TrainingCallback | None:
    """The callback for the services in `report_to`; it may also name pyloss's other services.

    Raises ValueError for an unknown service, ImportError for a missing package.
    """
    return callbacks_of(report_to, project_name, log_dir, config)
