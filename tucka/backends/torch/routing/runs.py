"""One run of an adapted model, and how a run is found again when its backward computes layers once more."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

from tucka.backends.torch.routing.alignment import align_gates, fitting_mask, mean_over_tokens, prompt_mask

__all__ = ["Generation", "Replays", "Run", "ThreadState", "is_transformed", "outside_checkpoints"]


class Run:
    """The masks of one forward and the routes that its layers share.

    Parameters
    ----------
    mask : Tensor, shape (B, S), optional
        Attention mask of the model's input, or of its encoder's.
    decoder_mask : Tensor, shape (B, S), optional
        Attention mask of a decoder that has an encoder.
    labels : Tensor, optional
        Where they have the shape of the tokens, they tell prompt from answer.
    continues : bool
        Whether the forward continues a filled key-value cache.
    grad : bool
        Whether a backward may follow.

    Attributes
    ----------
    routes : dict
        Adapter name to gates.
    token_masks : dict
        Adapter name to the mask that its routing feature took.
    made_in_decoder : dict
        Adapter name to whether a layer of the decoder made the route.
    """

    def __init__(
        self,
        *,
        mask: Any = None,
        decoder_mask: Any = None,
        labels: Tensor | None = None,
        continues: bool = False,
        grad: bool = False,
    ) -> None:
        self.mask = mask
        self.decoder_mask = decoder_mask
        self.labels = labels
        self.continues = continues
        self.grad = grad
        self.routes: dict[str, Tensor] = {}
        self.token_masks: dict[str, Tensor | None] = {}
        self.made_in_decoder: dict[str, bool] = {}

    def mask_for(self, x: Tensor, *, in_decoder: bool, prompt: bool) -> Tensor | None:
        """Choose which tokens of an input count in its routing feature.

        Parameters
        ----------
        x : Tensor, shape (B, ..., d)
            The input that is routed on.
        in_decoder : bool
            Whether the decoder of an encoder-decoder computes it.
        prompt : bool
            Whether only the tokens before the first label count.

        Returns
        -------
        Tensor, shape (B, S), or None
            None if all count.
        """
        mask = fitting_mask(self.decoder_mask if in_decoder else self.mask, x, continues=self.continues)
        return prompt_mask(mask, self.labels, x) if prompt and self.labels is not None else mask

    def fit(self, adapter: str, x: Tensor, *, in_decoder: bool) -> Tensor | None:
        """Fit the route of an adapter to a layer's input.

        Parameters
        ----------
        adapter : str
            Its name.
        x : Tensor, shape (..., d)
            The layer's input.
        in_decoder : bool
            Whether the layer is in the decoder of an encoder-decoder.

        Returns
        -------
        Tensor, shape (..., k, t), or None
            None if rows cannot be matched.
        """
        gates, mask = self.routes[adapter], self.token_masks.get(adapter)
        if gates.ndim > 3 and in_decoder != self.made_in_decoder.get(adapter, in_decoder):
            # Tokens of an encoder are no tokens of its decoder, even where there happen to be as many.
            gates, mask = mean_over_tokens(gates, mask), None
        return align_gates(gates, x, mask)

    def adopt(self, other: Run, names: list[str]) -> None:
        """Take over routes that an earlier forward made.

        Parameters
        ----------
        other : Run
            The earlier one.
        names : list of str
            The adapters.
        """
        for name in names:
            self.routes[name] = other.routes[name]
            self.token_masks[name] = other.token_masks.get(name)
            self.made_in_decoder[name] = other.made_in_decoder.get(name, False)

    def kept(self, token_routed: set[str], *, pool: bool, detach: bool) -> Run:
        """Copy what later forwards may reuse: routes of batches and samples; those of tokens end with their tokens.

        Parameters
        ----------
        token_routed : set of str
            Adapters whose tokens are routed one by one.
        pool : bool
            Whether their gates are kept as means per sample: an encoder's, for the decoder's steps.
        detach : bool
            Whether to cut the routes from their graphs.

        Returns
        -------
        Run
            The copy, without masks.
        """
        copy = Run()
        for name, gates in self.routes.items():
            if name in token_routed and not pool:
                continue
            pooled = mean_over_tokens(gates, self.token_masks.get(name)) if gates.ndim > 3 else gates
            copy.routes[name] = pooled.detach() if detach else pooled
            copy.made_in_decoder[name] = self.made_in_decoder.get(name, False)
        return copy

    def forget(self, adapter: str) -> None:
        """Drop the route of an adapter.

        Parameters
        ----------
        adapter : str
            Its name.
        """
        for entries in (self.routes, self.token_masks, self.made_in_decoder):
            entries.pop(adapter, None)


class Generation:
    """One generation: the mask it was given, and the routes that its first forward made."""

    def __init__(self, mask: Any) -> None:
        self.mask = mask
        self.held: Run | None = None


class ThreadState(threading.local):
    """What is running in one thread, so that threads may share a model.

    Attributes
    ----------
    current : Run or None
        The forward that is running.
    manual : Run or None
        The run of a `routing_scope` block; forwards of the model inside it belong to it.
    generation : Generation or None
        The generation that is running.
    latest : Run or None
        The last forward, alive until the next one for a backward that reaches it past its outputs.
    """

    current: Run | None = None
    manual: Run | None = None
    generation: Generation | None = None
    latest: Run | None = None


class Replays:
    """Finds the run that a backward belongs to, for gradient checkpointing.

    A hook on a forward's outputs fires first in its backward and names the run, under the number of the backward. The
    outputs' graph keeps the run alive, nothing else does: so nothing has to be cleared.

    Examples
    --------
    >>> Replays().run() is None
    True
    """

    def __init__(self) -> None:
        self._by_task: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
        self._pending: weakref.WeakSet[Run] = weakref.WeakSet()

    def watch(self, run: Run, output: Any) -> None:
        """Let the backward of an output find its run.

        Parameters
        ----------
        run : Run
            The forward that has just ended.
        output : object
            What the model returned.
        """
        self._pending.add(run)
        # Transformers' outputs are dictionaries that torch's tree functions may not know.
        for leaf in pytree.tree_leaves(dict(output) if isinstance(output, dict) else output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(_Replay(self, run))

    def begin(self, run: Run) -> None:
        """Note that the backward which is running now has reached a run's outputs.

        Parameters
        ----------
        run : Run
            The run.
        """
        self._by_task[torch._C._current_graph_task_id()] = run

    def run(self) -> Run | None:
        """Return the run that the backward of this thread is in.

        Returns
        -------
        Run or None
            None outside of a backward. If the backward did not come through a model's outputs (a loss on hidden
            states that a hook took, for instance): the one run that is alive, and None if there are several.
        """
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        run = self._by_task.get(task)
        if run is None:
            alive = list(self._pending)
            run = alive[0] if len(alive) == 1 else None
        return run


class _Replay:
    """A hook on an output's gradient: the backward of this forward starts now."""

    __torch_unserializable__ = True  # an output may be saved to a file; its hook is not part of it

    def __init__(self, replays: Replays, run: Run) -> None:
        self.replays = replays
        self.run = run

    def __call__(self, _gradient: Tensor) -> None:
        self.replays.begin(self.run)


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor exists only inside a transformation of `torch.func`, and must not be kept beyond it.

    Parameters
    ----------
    tensor : Tensor
        Any.

    Returns
    -------
    bool
        False in compiled code.

    Examples
    --------
    >>> is_transformed(torch.ones(2)), bool(torch.vmap(lambda x: x + is_transformed(x))(torch.zeros(2)).all())
    (False, True)
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def outside_checkpoints() -> Iterator[None]:
    """Keep what is computed inside out of gradient checkpointing: it is not computed again in the backward.

    A route is made once, by whichever layer is first. Recomputing it with that layer would need to know which of the
    layer's calls it was (layers that share weights are called many times), and would repeat its collectives. What the
    route keeps for its backward is a vector per sample or batch.

    Yields
    ------
    None
        Nothing.

    Examples
    --------
    >>> with outside_checkpoints():
    ...     pass
    """
    with contextlib.ExitStack() as stack:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Checkpoints see what is saved through the innermost pair of such hooks; torch.func allows none.
            with contextlib.suppress(RuntimeError):
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
            # Selective ones count the operations themselves, and take those of the recomputation for the same ones.
            if any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack()):
                stack.enter_context(_disable_current_modes())
        yield
