"""Functions named by import path, as settings name them: "package.module:function"."""

import importlib
from collections.abc import Callable
from typing import Any


def import_function(path: str, name: str = "import_function") -> Callable[..., Any]:
    """Returns the callable that a path such as "my_package.rewards:short_caption" names.

    Args:
        path: module and attribute; the module must be importable, so its folder must be on sys.path.
        name: what errors call the caller.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f'{name}: expected a path like "package.module:function", got {path!r}')
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        # the module itself, or one of its packages, or something that it imports
        if module_name == missing or module_name.startswith(missing + "."):
            raise ImportError(
                f"{name}: expected module {module_name!r} of {path!r} to be importable, got no module "
                f"named {missing!r}; install it or put its folder on PYTHONPATH"
            ) from error
        raise ImportError(
            f"{name}: module {module_name!r} of {path!r} needs {missing!r}, which is not installed"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = ", ".join(sorted(n for n, v in vars(found).items() if callable(v) and not n.startswith("_")))
            raise AttributeError(f"{name}: expected {part!r} in {module_name!r}, got only {known or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name}: expected {path!r} to be callable, got {type(found).__name__}")
    return found
