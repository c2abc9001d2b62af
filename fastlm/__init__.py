"""fastlm: any positional scheme, and any optimizer language models are trained with, at the speed of the plain kernel."""

from fastlm import positions
from fastlm.dispatch import BackendError, SlowPathWarning, use_backend
from fastlm.functional import attention, rotate

__version__ = "0.1.0"
__all__ = ["BackendError", "SlowPathWarning", "attention", "positions", "rotate", "use_backend"]
