"""An extension of griffe, which reads the docstrings for the API reference.

Google's style has the heading `Example:` for one example. Griffe knows only `Examples:`, and shows any other
heading as a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Reads a section `Example:` as a section `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the heading in the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
