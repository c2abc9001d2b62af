"""The operations. Each file is in the same three parts: definition, backends, gradient; attention's backends, of which
those in CUDA C++ by themselves, and its second derivatives fill files of their own, and the optimizers share theirs
(update.py). Importing the package registers all.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
