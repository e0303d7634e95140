"""Stand-ins for latents: a scheduler of diffusers adds them and multiplies them by numbers, and can do no more.

    form = Form(symbol);  moved = scheduler.step(Form(output), t, form)[0].held

Numbers may be floats, numpy's, or tensors of one number, as diffusers has its sigmas.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SHAPE = torch.Size((1, 4, 8, 8))  # some classes look at the channels; nothing depends on the numbers


class Unfit(Exception):
    """The scheduler does what no table holds; the message goes on after its name."""


class Form:
    """A latent that is only added and multiplied by numbers. `held` is the tracer's symbol, or a tensor in tests."""

    shape, ndim = SHAPE, len(SHAPE)
    dtype = torch.float64
    device = torch.device("cpu")
    __array_ufunc__ = None  # numpy's numbers leave `number * form` to us

    def __init__(self, held: Any) -> None:
        self.held = held

    def to(self, *_: Any, **__: Any) -> Form:
        return self

    clone = detach = float = double = contiguous = to

    def __add__(self, other: Any) -> Form:
        return Form(self.held + (other.held if isinstance(other, Form) else number(other)))

    __radd__ = __add__

    def __mul__(self, other: Any) -> Form:
        return Form(self.held * number(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Form:
        return Form(self.held / number(other))

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Any) -> Form:
        return self + (-other)

    def __rsub__(self, other: Any) -> Form:
        return -self + other

    def compare(self, other: Any = None) -> bool:
        raise Unfit("compares latents, so that its path depends on the picture")

    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = compare  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise Unfit(f"uses '{name}' of a latent")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.strip("_")
        if name in BINARY:
            return BINARY[name](*(value if isinstance(value, Form) else number(value) for value in args))
        if name == "zeros_like":
            return 0.0
        if name == "stack":
            return Stack(args[0])
        raise Unfit(f"applies torch.{name} to a latent")


BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "truediv": operator.truediv,
    "rsub": lambda x, y: y - x,
}


class Stack(list[Form]):
    """Forms in a row, for UniPC's weighted sum."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.einsum or args[0] != "k,bkc...->bc...":
            raise Unfit(f"applies torch.{function.__name__} to latents")
        return sum((form * factor for factor, form in zip(args[1], args[2], strict=True)), 0.0)


def number(value: Any) -> float:
    """A factor as a float. Raises Unfit for another latent, and for tensors of many numbers."""
    if isinstance(value, Form):
        raise Unfit("multiplies or divides latents with each other")
    if getattr(value, "ndim", 0) and math.prod(value.shape) > 1:
        raise Unfit("mixes a latent with a tensor that is not made of latents (noise of its own?)")
    return float(value)


class Draws(TorchFunctionMode):
    """Inside, torch.randn is `draw`: the row's generator, whatever the scheduler thinks it asks."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.draw() if function in (torch.randn, torch.randn_like) else function(*args, **(kwargs or {}))
