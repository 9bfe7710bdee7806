"""Where a forward of a model begins and ends: hooks on the model, its encoder and its generation."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.generation import HeldGeneration, encoder_of, is_causal, is_filled, key_value_cache
from tucka.backends.torch.routing.runs import Generation, Replays, Run, ThreadState, is_transformed

__all__ = ["ForwardHooks"]


class ForwardHooks:
    """Keeps track of the forward that is running in one model.

    Attributes
    ----------
    last : dict
        Adapter name to the gates of the latest forward, detached; None before the first one.
    """

    def __init__(self) -> None:
        self.last: dict[str, Tensor | None] = {}
        self._root: nn.Module | None = None
        self._handles: list[Any] = []
        self._forget_runs()

    def _forget_runs(self) -> None:
        self._state = ThreadState()
        self._replays = Replays()
        self._by_cache: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the routes of running forwards behind: they hold graphs, which cannot be copied."""
        return {name: value for name, value in vars(self).items() if name not in ("_state", "_replays", "_by_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_runs()

    def token_routed(self) -> set[str]:
        """Return the adapters whose tokens are routed one by one.

        Returns
        -------
        set of str
            Their names.
        """
        return set()

    def attach(self, root: nn.Module) -> None:
        """Put the hooks on a model; once, however often it is called.

        Parameters
        ----------
        root : Module
            The model whose forward is one routing decision.
        """
        if self._root is not None:
            return
        self._root = root
        # Bound methods and not closures: a deep copy of the model then calls the copy of this scope.
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        encoder = encoder_of(root)
        if encoder is not None:
            self._handles += [
                encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True),
                encoder.register_forward_hook(self._after_encoder, always_call=True),
            ]
        HeldGeneration.put_on(root, self)

    def detach(self) -> None:
        """Take everything off the model again that `attach` put there."""
        for handle in self._handles:
            handle.remove()
        if self._root is not None:
            HeldGeneration.take_off(self._root)
        self._handles, self._root = [], None
        self._forget_runs()

    def known_runs(self) -> list[Run]:
        """List the runs of this thread and of all caches that hold a route.

        Returns
        -------
        list of Run
            Running, held, or kept for later.
        """
        state = self._state
        held = state.generation.held if state.generation is not None else None
        runs = (state.current, state.manual, state.latest, held, *self._by_cache.values())
        return [run for run in runs if run is not None]

    def running(self) -> Run | None:
        """Return the forward that a layer which is called now belongs to.

        Returns
        -------
        Run or None
            A block of `manual_run`, the running forward, or the one whose backward computes layers again.
        """
        return self._state.manual or self._state.current or self._replays.run()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = _named_arguments(module, args, kwargs)
        mask, decoder_mask = named.get("attention_mask"), named.get("decoder_attention_mask")
        labels = named.get("labels") if is_causal(module) else None
        manual = self._state.manual
        if manual is not None:
            manual.mask = mask if manual.mask is None else manual.mask
            manual.decoder_mask, manual.labels = decoder_mask, labels
            return
        self._begin(mask, decoder_mask, labels, key_value_cache(named))

    def _begin(self, mask: Any, decoder_mask: Any = None, labels: Any = None, cache: Any = None) -> None:
        """Start a forward: the next adapted layer that runs makes the route, unless one is held for this forward."""
        state, continues = self._state, is_filled(cache)
        held = None
        if state.generation is not None:
            held = state.generation.held
            # A mask that generation has already widened to four axes tells no padding any more.
            mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else state.generation.mask
        if held is None and continues and not torch.compiler.is_compiling():
            with contextlib.suppress(TypeError):  # tuples, the old kind of cache, take no weak references
                held = self._by_cache.get(cache)
        run = Run(
            mask=mask,
            decoder_mask=decoder_mask,
            labels=labels,
            continues=continues,
            grad=torch.is_grad_enabled(),
        )
        if held is not None:
            run.adopt(held, list(held.routes))
        state.current, state.latest = run, None

    def _after(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._state.manual is None:
            # Without an output the forward has failed.
            self._end(output, key_value_cache(kwargs, output))

    def _end(self, output: Any, cache: Any = None) -> None:
        """End a forward: keep what its backward, its cache or its generation will need."""
        state = self._state
        run, state.current = state.current, None
        if run is None or output is None:
            return
        self._remember(run)
        if torch.compiler.is_compiling():
            return
        if state.generation is not None and state.generation.held is None and run.routes:
            state.generation.held = run.kept(self.token_routed(), pool=False, detach=False)
        if cache is not None and is_filled(cache):
            with contextlib.suppress(TypeError):
                self._by_cache[cache] = run.kept(self.token_routed(), pool=False, detach=True)
        if run.grad:
            state.latest = run
            self._replays.watch(run, output)

    def _remember(self, run: Run) -> None:
        self.last.update({name: gates.detach() for name, gates in run.routes.items() if not is_transformed(gates)})

    def _before_encoder(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Generation calls an encoder outside of the model's forward."""
        if self._state.generation is not None and self._state.current is None and self._state.manual is None:
            self._begin(kwargs.get("attention_mask"))

    def _after_encoder(self, _module: nn.Module, _args: Any, output: Any) -> None:
        generation, run = self._state.generation, self._state.current
        if generation is None or run is None or self._state.manual is not None or generation.held is not None:
            return
        if output is not None and run.routes:
            generation.held = run.kept(self.token_routed(), pool=True, detach=False)
        self._end(output)

    @contextlib.contextmanager
    def hold(self, mask: Any = None) -> Iterator[None]:
        """Hold the first route (of batch and sample routing) for all forwards inside: one generation.

        Parameters
        ----------
        mask : Tensor, shape (B, S), optional
            The prompt's attention mask, for forwards that get it in another form.

        Yields
        ------
        None
            Nothing.
        """
        if self._state.generation is not None:
            yield
            return
        self._state.generation = Generation(mask)
        try:
            yield
        finally:
            self._state.generation = self._state.current = None

    @contextlib.contextmanager
    def manual_run(self, mask: Tensor | None = None) -> Iterator[None]:
        """Take everything that runs inside as one forward.

        Parameters
        ----------
        mask : Tensor, shape (B, S), optional
            Padding does not count in the routing feature.

        Yields
        ------
        None
            Nothing.
        """
        state, outer = self._state, self._state.manual
        state.manual = run = Run(mask=mask, grad=torch.is_grad_enabled())
        try:
            yield
        finally:
            state.manual, state.current = outer, None
            self._remember(run)
            if run.grad:
                state.latest = run
                self._replays.watch(run, None)


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) <= 1:  # the usual call, which needs no look at the signature
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
