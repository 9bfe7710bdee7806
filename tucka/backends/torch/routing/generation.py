"""Where a generation begins and ends, which of the calls inside are its own, and the route that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.steps import Steps
from tucka.backends.torch.together import Shared

if TYPE_CHECKING:
    from tucka.backends.torch.routing.routes import Route

__all__ = ["Generating", "Generation", "Preparing", "Sharing"]


class Generation:
    """One call of ``generate``: the prompt that it was given, and the routes of that prompt."""

    def __init__(self, prompt: Tensor | None, mask: Any, times: int) -> None:
        self.rows = None if prompt is None else prompt.shape[0]
        self.prompt_tokens = prompt.shape[1] if prompt is not None and prompt.ndim > 1 else None
        self.times = times  # how many rows there are for each of the prompt: beams, or sequences to return
        self.mask = mask
        self.held: dict[str, Route] = {}
        # What encoders have returned, and the routes of that.
        self.encoded: list[tuple[Tensor, dict[str, Route]]] = []
        self.prepared: list[Tensor] = []
        self.steps = Steps()  # what its calls have in common in each layer
        self.last: tuple[Any, ...] | None = None  # its latest call, cache and routes

    def owns(self, kwargs: Mapping[str, Any]) -> bool:
        """Tell whether a call of the model is this generation's own: its inputs were prepared just before."""
        if torch.compiler.is_compiling():
            return bool(self.prepared)
        return any(value is known for value in kwargs.values() for known in self.prepared)

    def mask_for(self, rows: Tensor, made: Any) -> Any:
        """Return the mask (B, S) that was given, for an input (B, S, d) of the first call; else what was made."""
        mask = self.mask
        if not isinstance(mask, Tensor) or mask.ndim != 2 or rows.shape[0] % mask.shape[0] or rows.ndim < 3:
            return made
        mask = mask.repeat_interleave(rows.shape[0] // mask.shape[0], dim=0)
        return nn.functional.pad(mask, (0, max(0, rows.shape[1] - mask.shape[1])), value=1)

    def expanded(self, hidden: Tensor) -> dict[str, Route] | None:
        """Return the routes of an encoder's output that generation has repeated for its beams; None for others."""
        for known, routes in reversed(self.encoded):
            if hidden.shape[1:] != known.shape[1:] or hidden.shape[0] != known.shape[0] * self.times:
                continue
            if torch.equal(hidden, known.repeat_interleave(self.times, dim=0)):
                return {name: route.repeated(self.times) for name, route in routes.items()}
        return None


class _Replaced:
    """A method of one model that is called by tucka first, and can be copied and pickled with the model."""

    name: str

    def __init__(self, scope: Any, model: nn.Module) -> None:
        self.scope = scope
        self.model = model
        # Another library's, put there before.
        self.inner = vars(model).get(self.name)

    @property
    def __wrapped__(self) -> Any:
        """What is called, for `inspect.signature`."""
        return getattr(type(self.model), self.name).__get__(self.model) if self.inner is None else self.inner

    @classmethod
    def put_on(cls, model: nn.Module, scope: Any) -> None:
        """Replace the method of one model, if it has it."""
        if callable(getattr(model, cls.name, None)):
            vars(model)[cls.name] = cls(scope, model)

    @classmethod
    def take_off(cls, model: nn.Module, scope: Any) -> None:
        """Put back what was there before."""
        found = vars(model).get(cls.name)
        if isinstance(found, cls) and found.scope is scope:
            del vars(model)[cls.name]
            if found.inner is not None:
                vars(model)[cls.name] = found.inner


class Generating(_Replaced):
    """The ``generate`` of an adapted model, with one route from the prompt to the end."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, with the arguments of the model's own method."""
        generation = Generation(self._prompt(args, kwargs), kwargs.get("attention_mask"), self._times(kwargs))
        with self.generating(generation):
            return self.__wrapped__(*args, **kwargs)

    def _prompt(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        names = ("inputs_embeds", "input_ids", "inputs", getattr(self.model, "main_input_name", "input_ids"))
        values = (*(kwargs.get(name) for name in names), *args[:1])
        return next((value for value in values if isinstance(value, Tensor)), None)

    def _times(self, kwargs: Mapping[str, Any]) -> int:
        """Say how many rows generation makes of each row of the prompt."""
        configs = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        times = 1
        for name in ("num_beams", "num_return_sequences"):
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            times = max(times, next((value for value in values if value is not None), 1))
        return times

    @contextlib.contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Keep the record of a generation while it runs, whatever ends it."""
        stack = self.scope.forwards.state.generations
        stack.append(generation)
        try:
            yield
        finally:
            del stack[stack.index(generation) :]
            self.scope.memory.end_generation(generation)


class Preparing(_Replaced):
    """The ``prepare_inputs_for_generation`` of an adapted model: what it returns is what the next own call gets."""

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare inputs, and remember them as those of the generation that runs."""
        prepared = self.__wrapped__(*args, **kwargs)
        generations = self.scope.forwards.state.generations
        if generations and isinstance(prepared, dict):
            names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
            found = [prepared[name] for name in names if isinstance(prepared.get(name), Tensor)]
            generations[-1].prepared = found
            self.scope.memory.prepare(generations[-1])
        return prepared


class Sharing(_Replaced):
    """The ``forward`` of a model whose calls need no record, since all adapters are pinned: its layers share cores."""

    name = "forward"

    @property
    def __code__(self) -> Any:
        """The code of what is called, for `torch.export`."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward."""
        if torch.compiler.is_compiling():
            return self.__wrapped__(*args, **kwargs)
        state = self.scope.forwards.state
        around, state.shared = state.shared, Shared()
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            state.shared = around
            if around is not None:
                around.opened = None
