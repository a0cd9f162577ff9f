"""What griffe, which reads the docstrings for the documentation, has to know of this project's.

They have a section "Example:". griffe shows a section "Examples:" as a session of Python, and takes the other one for a
remark.
"""

from typing import Any

import griffe


class OneExample(griffe.Extension):
    """Reads "Example:" as the section of examples that it is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class and function."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
