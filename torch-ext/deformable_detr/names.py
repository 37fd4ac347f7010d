"""Other names of arguments."""

import functools
from typing import Any, Callable, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def also_named(**others: str) -> Callable[[Function], Function]:
    """A decorator: arguments may be given by these names as well, each to the argument it names."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for name in others.keys() & kwargs.keys():
                if others[name] in kwargs:
                    raise TypeError(
                        f"{function.__name__} got {name} and {others[name]}, which are one argument"
                    )
                kwargs[others[name]] = kwargs.pop(name)
            return function(*args, **kwargs)

        return cast(Function, renamed)

    return decorate


# What mmcv's extension and the callers of the original one name the arguments of version 1.
OF_EXTENSIONS = {
    "value_spatial_shapes": "spatial_shapes",
    "value_level_start_index": "level_start_index",
    "sampling_locations": "sampling_loc",
    "attention_weights": "attn_weight",
}
