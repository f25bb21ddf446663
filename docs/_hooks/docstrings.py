"""Public signatures and docstrings as the API reference shows them."""

import re
from typing import Any

from griffe import Extension, Function, Object


class Public(Extension):
    """Leaves out arguments that are private, and shows an ``Example`` as code, as griffe does ``Examples``."""

    def on_object(self, *, obj: Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_function(self, *, func: Function, **others: Any) -> None:
        for name in [parameter.name for parameter in func.parameters if parameter.name.startswith("_")]:
            del func.parameters[name]
