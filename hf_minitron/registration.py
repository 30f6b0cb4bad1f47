"""Nonuniform models are known to transformers' Auto classes once both packages are imported, in either order.

Importing transformers' model classes takes seconds of processor time, so what does without them, such as the command's help,
does not.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIBRARY, CLASSES = "transformers", "hf_minitron.modeling"


class _Follow(MetaPathFinder):
    """Finds transformers as others do, and imports our classes right behind it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of transformers with one more thing to do; of other modules nothing."""
        if name != LIBRARY:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            sys.meta_path.remove(self)
            importlib.import_module(CLASSES)

        spec.loader.exec_module = exec_module
        return spec


def follow_transformers() -> None:
    """Import our classes now if transformers is there, else right after it."""
    if LIBRARY in sys.modules:
        importlib.import_module(CLASSES)
    elif not any(isinstance(finder, _Follow) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follow())
