"""Methods of a model that are called instead of its forward: they begin a call as that does, or go on with one."""

from __future__ import annotations

from typing import Any

from torch import nn

from tucka.backends.torch.routing.calls import Call

__all__ = ["Method"]

# By library. The first begin a call with the model's inputs; the second go on with what one of the first returned.
_BEGIN = {"timm": ("forward_features", "forward_intermediates", "get_intermediate_layers")}
_GO_ON = {"timm": ("forward_head",)}


class Method:
    """A method of one model that is recorded as the forward is, unless it runs inside of a recorded call."""

    def __init__(self, call: Call, name: str, *, goes_on: bool) -> None:
        self.call = call
        self.name = name
        self.goes_on = goes_on
        # Another library's, put there before.
        self.inner = vars(call.module).get(name)

    @property
    def __wrapped__(self) -> Any:
        """What is called, for `inspect.signature`."""
        module = self.call.module
        return getattr(type(module), self.name).__get__(module) if self.inner is None else self.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own method, with the arguments of that."""
        if any(forward.module is self.call.module for forward in self.call.scope.forwards.state.open):
            return self.__wrapped__(*args, **kwargs)
        return self.call.run(self.__wrapped__, args, kwargs, method=self)

    @classmethod
    def put_on(cls, module: nn.Module) -> None:
        """Let calls of the methods of a model be recorded, as those of its forward are."""
        libraries = {kind.__module__.partition(".")[0] for kind in type(module).__mro__}
        for goes_on, table in ((False, _BEGIN), (True, _GO_ON)):
            names = [name for library in libraries for name in table.get(library, ())]
            for name in names:
                if callable(getattr(module, name, None)):
                    vars(module)[name] = cls(vars(module)["forward"], name, goes_on=goes_on)

    @classmethod
    def take_off(cls, module: nn.Module, scope: Any) -> None:
        """Put back what was there before."""
        for name, method in list(vars(module).items()):
            if isinstance(method, cls) and method.call.scope is scope:
                del vars(module)[name]
                if method.inner is not None:
                    vars(module)[name] = method.inner
