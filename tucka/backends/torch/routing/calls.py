"""What is put on a model's modules so that their calls are recorded, and taken off again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.private import checkpoint_frame
from tucka.backends.torch.routing.forwards import Forward, Forwards
from tucka.backends.torch.routing.inputs import caches_in
from tucka.backends.torch.routing.parts import Part
from tucka.backends.torch.together import Shared

__all__ = ["Call", "Parent"]


class Call:
    """The ``forward`` of a module that begins a call: its class's own, with a record of it while it runs."""

    def __init__(self, scope: Any, module: nn.Module, part: Part) -> None:
        self.scope = scope
        self.module = module
        self.part = part
        # Another library's, put there before.
        self.inner = vars(module).get("forward")

    @property
    def __wrapped__(self) -> Any:
        """What is called, for `inspect.signature`."""
        return type(self.module).forward.__get__(self.module) if self.inner is None else self.inner

    @property
    def __code__(self) -> Any:
        """The code of what is called, for `torch.export`."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with the arguments of that."""
        return self.run(self.__wrapped__, args, kwargs)

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], method: Any = None) -> Any:
        """Run the forward, or another method of the module, with a record of it."""
        forwards: Forwards = self.scope.forwards
        stack = forwards.state.open
        parent = stack[-1] if stack else None
        if any(running.module is self.module for running in stack):  # for somebody else, from inside of itself
            parent = None
        generations = forwards.state.generations
        steps = generations[-1].steps if generations else None
        around = None if steps is None else steps.now
        forward = Forward(self.part, self.module, args, kwargs, parent, self.scope.names)
        if forward.grad and not torch.compiler.is_compiling():
            forward.frame = checkpoint_frame()[0]
        self.scope.memory.begin(forward)
        if method is not None and method.goes_on:
            self.scope.memory.go_on(forward)
        stack.append(forward)
        shared = forwards.state.shared
        if not torch.compiler.is_compiling():
            forwards.state.shared = Shared()
        try:
            output = function(*args, **kwargs)
            self.scope.memory.end(forward, output, next(caches_in(_parts_of(output)), None))
            if method is not None and not method.goes_on:
                self.scope.memory.hand_on(forward, output)
        finally:  # whatever ends the call
            del stack[stack.index(forward) :]
            if not torch.compiler.is_compiling():
                forwards.state.shared = shared
                if shared is not None:
                    shared.opened = None
                if steps is not None:
                    steps.now = around
        return output

    @classmethod
    def put_on(cls, module: nn.Module, scope: Any, part: Part) -> None:
        """Let calls of a module be recorded."""
        vars(module)["forward"] = cls(scope, module, part)

    @classmethod
    def take_off(cls, module: nn.Module, scope: Any) -> None:
        """Put back what was there before."""
        call = vars(module).get("forward")
        if isinstance(call, cls) and call.scope is scope:
            del vars(module)["forward"]
            if call.inner is not None:
                vars(module)["forward"] = call.inner


def _parts_of(output: Any) -> Any:
    return output if isinstance(output, (dict, tuple, list)) else ()


class Parent:
    """Notes what the parent of a layer was called with, where the layer gets tokens and tables of positions."""

    @staticmethod
    def put_on(module: nn.Module, scope: Any) -> None:
        """Note the tensors of each call of a module."""
        notes = vars(module).setdefault("_tucka_notes", {})
        if scope.key not in notes:
            notes[scope.key] = module.register_forward_pre_hook(_Note(scope), with_kwargs=True)

    @staticmethod
    def take_off(module: nn.Module, scope: Any) -> None:
        """Stop noting."""
        handle = vars(module).get("_tucka_notes", {}).pop(scope.key, None)
        if handle is not None:
            handle.remove()


class _Note:
    """A hook that tells the running call which tensors belong to its samples."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self.scope.forwards.innermost(self.scope.part_around(_module))
        if forward is not None:
            named = (*args[:1], kwargs.get("hidden_states"), kwargs.get("query_states"))
            forward.of_samples = tuple(value for value in named if isinstance(value, Tensor))
