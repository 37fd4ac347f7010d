"""The ops of this build, in its namespace, whose library is loaded once.

torch-universal has no library: its ops are defined in Python, in the package ``universal``.

A build's id names its library, its ops' namespace and its Python modules. Builds of tools/build.py
share an id only where they are of the same sources. Those of kernel-builder have the short id of a
commit, and two of uncommitted changes share it. Python and torch would go on with what was loaded
first, silently: here that is refused.
"""

import filecmp
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Optional, Sequence, Tuple

import torch

SUFFIX = ".abi3.so"


def _state(file: Path) -> Optional[Tuple[int, int]]:
    """What changes when a file is written: its size and time; None if there is none."""
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


class _Build:
    """The files of a build as they were when it was loaded: its library and modules.

    Without a library, ``_ops.py`` stands for it, as it has the id and the schemas.
    """

    def __init__(self, folder: Path):
        libraries = [*folder.glob(f"*{SUFFIX}")]
        (library,) = libraries or [folder / "_ops.py"]
        self.folder, self.library = folder, library.name
        if libraries:
            self.id = library.name[: -len(SUFFIX)]
        else:
            from ._ops import ops

            self.id = ops.name
        self.files: Dict[str, Optional[Tuple[int, int]]] = {
            str(file.relative_to(folder)): _state(file) for file in (library, *folder.rglob("*.py"))
        }

    def has(self, name: str, other: "_Build") -> bool:
        """Whether the other build's file of this name is the same. They are read only here."""
        file = self.folder / name
        if name not in self.files or _state(file) != self.files[name]:
            return False  # or written since, perhaps with the same content: there is no telling
        return self.folder == other.folder or filecmp.cmp(file, other.folder / name, shallow=False)

    def refuse(self, other: "_Build") -> None:
        raise ImportError(
            f"{other.folder} has another build than {self.folder} had when this process loaded it, "
            f"and the same id, {self.id}: use it in a new process, or commit its sources and build "
            "it again"
        )


def _use_loaded_ops() -> _Build:
    """If the process has this build's ops, has ``_ops`` use them in place of another library.

    That happens if this package is imported a second time, from a copy of its folder. To load the
    library again would end the process: torch's StableLibrary does not notice that its namespace is
    taken.
    """
    build = _Build(Path(__file__).parent)
    if build.id.endswith("_dirty"):
        text = f"{build.id} was built of uncommitted changes: other builds may have its id"
        warnings.warn(text, stacklevel=2)
    namespace = getattr(torch.ops, build.id)
    if hasattr(namespace, "ms_deform_attn_forward"):
        if not namespace.loaded_build.has(build.library, build):
            namespace.loaded_build.refuse(build)
        setattr(sys.modules[__package__], build.id, namespace)
    else:
        namespace.loaded_build = build
    return build


def check_build(folder: Path) -> None:
    """Raises ImportError if a package has the modules of another build, of the same id.

    Args:
        folder: That of the package. Where the process has loaded another package of its id, Python
            runs the ``__init__.py`` of this one, but gives it the modules of the other.
    """
    if folder != _BUILD.folder:
        other = _Build(folder)
        if other.files.keys() != _BUILD.files.keys() or not all(
            _BUILD.has(name, other) for name in other.files
        ):
            _BUILD.refuse(other)


_BUILD = _use_loaded_ops()

from ._ops import add_op_namespace_prefix, ops  # noqa: E402, F401

# Only the universal build has them: keeping(op, arguments) is the op's result and tensors to save
# for its backward op, which runs under given(those tensors).
keeping: Optional[Callable[..., Tuple[Any, Sequence[torch.Tensor]]]] = None
given: Optional[Callable[[Sequence[torch.Tensor]], ContextManager[None]]] = None

if not hasattr(ops, "ms_deform_attn_forward"):
    from . import universal  # type: ignore[attr-defined]

    keeping, given = universal.keeping, universal.given
