"""`python -m pyloss.interop.lm_eval`: lm-eval's command line, with the model `pyloss`."""

from lm_eval.__main__ import cli_evaluate

import pyloss.interop.lm_eval  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
