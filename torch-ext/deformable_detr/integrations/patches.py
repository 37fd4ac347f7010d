"""Attributes of classes and names of modules that are replaced while a context is entered."""

import threading
from contextlib import contextmanager

_ABSENT = object()
_lock = threading.Lock()
_places = {}  # by (id of the owner, name)


@contextmanager
def replaced(replacements):
    """Replaces attributes while the context is entered.

    Contexts may overlap and end in any order, in one thread or several: an attribute has the
    replacement of the context that was entered last among those still entered, and its original
    once all have ended.

    Args:
        replacements: (owner, name, replacement) triples; the owner is a class, a module, or a
            module's namespace, a dict.
    """
    entries = []
    try:
        with _lock:
            for owner, name, replacement in replacements:
                entries.append(_Entry(owner, name, replacement))
        yield
    finally:
        with _lock:
            for entry in reversed(entries):
                entry.end()


def original(owner, name, default=None):
    """What the owner itself (a class: without its bases) has where nothing is replaced."""
    with _lock:
        place = _places.get((id(owner), name))
    value = _own(owner, name) if place is None else place.original
    return default if value is _ABSENT else value


class _Entry:
    """One context's replacement of one attribute."""

    def __init__(self, owner, name, replacement):
        self.replacement = replacement
        self.place = _places.setdefault((id(owner), name), _Place(owner, name))
        self.place.entries.append(self)
        self.place.apply()

    def end(self):
        self.place.entries.remove(self)
        self.place.apply()


class _Place:
    """An attribute, what it was, and the entries that replace it, the last one entered last."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name  # the reference keeps the owner's id its own
        self.original = _own(owner, name)
        self.entries = []

    def apply(self):
        value = self.entries[-1].replacement if self.entries else self.original
        if isinstance(self.owner, dict):
            if value is _ABSENT:
                self.owner.pop(self.name, None)
            else:
                self.owner[self.name] = value
        elif value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)
        if not self.entries:
            del _places[id(self.owner), self.name]


def _own(owner, name):
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _ABSENT)
