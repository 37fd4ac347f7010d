"""This kernel inside models and projects that know nothing of it."""

from ..portable import decompositions
from .extensions import replace_extensions
from .functions import replace_function
from .transformers import use_in_transformers

__all__ = ["decompositions", "replace_extensions", "replace_function", "use_in_transformers"]
