"""Attributes of classes, and names of modules, that are replaced for a time."""

import threading
from typing import Any, Dict, Iterable, List, Tuple

_ABSENT = object()
_lock = threading.Lock()
_places: Dict[Tuple[int, str], "_Place"] = {}  # by (id of the owner, name)


class Replacement:
    """Attributes that are replaced, from the moment it is made until ``undo``.

    A context manager, too, which undoes them when the context is left. Replacements may overlap and
    end in any order, in one thread or several: an attribute has the replacement made last among
    those not undone, and its original once all are.

    Args:
        replacements: (owner, name, replacement) triples; the owner is a class, a module, or a
            module's namespace, a dict.
        names: what is replaced, in words for the user.
    """

    def __init__(
        self, replacements: Iterable[Tuple[Any, str, Any]], names: Iterable[str] = ()
    ) -> None:
        self.names = list(names)
        self._entries: List[_Entry] = []
        with _lock:
            for owner, name, replacement in replacements:
                self._entries.append(_Entry(owner, name, replacement))

    def undo(self) -> None:
        """Puts back what was there; a second call does nothing."""
        with _lock:
            while self._entries:
                self._entries.pop().end()

    def __enter__(self) -> "Replacement":
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "replaced" if self._entries else "undone"
        return f"<{', '.join(self.names)} {state} by deformable-detr>"


def original(owner: Any, name: str, default: Any = None) -> Any:
    """What the owner itself (a class: without its bases) has where nothing is replaced."""
    with _lock:
        place = _places.get((id(owner), name))
    value = _own(owner, name) if place is None else place.original
    return default if value is _ABSENT else value


class _Entry:
    """One replacement of one attribute."""

    def __init__(self, owner: Any, name: str, replacement: Any) -> None:
        self.replacement = replacement
        self.place = _places.setdefault((id(owner), name), _Place(owner, name))
        self.place.entries.append(self)
        self.place.apply()

    def end(self) -> None:
        self.place.entries.remove(self)
        self.place.apply()


class _Place:
    """An attribute, what it was, and the entries that replace it, the last one made last."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name  # the reference keeps the owner's id its own
        self.original = _own(owner, name)
        self.entries: List[_Entry] = []

    def apply(self) -> None:
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


def _own(owner: Any, name: str) -> Any:
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _ABSENT)
