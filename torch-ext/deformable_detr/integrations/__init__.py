"""This kernel inside models that know nothing of it."""

from .transformers import use_in_transformers

__all__ = ["use_in_transformers"]
