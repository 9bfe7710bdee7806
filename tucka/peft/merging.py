"""Writing pinned adapters into base weights, all or nothing, and taking them out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from tucka.backends.torch.base_layers import input_axis, open_weight, weight_rows
from tucka.backends.torch.functional import mix_cores
from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.routing.scope import RoutingScope
from tucka.errors import RouteError, TuckaError, expected

__all__ = ["Merging", "check_merge", "unmerge_for_a_new_adapter"]


class Merging:
    """The part of an adapted layer that merges; expects the attributes of `TuckALayer`."""

    active_adapters: list[str]
    merged: bool
    merged_adapters: list[str]
    in_features: int
    tucka_experts: nn.ModuleDict
    tucka_merged: dict[str, tuple[Tensor, Tensor]]
    tucka_scope: RoutingScope
    get_base_layer: Callable[[], Any]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        r"""Write pinned adapters into the base weight, :math:`W' = (I + \sum_a \alpha_a U_a \bar G_a U_a^\top)\, W`.

        Parameters
        ----------
        safe_merge : bool
            Whether to look for NaN and infinity before anything is written.
        adapter_names : list of str, optional
            Which; the active ones if None.

        Raises
        ------
        RouteError
            If an adapter is not pinned: its update depends on the input, so no weight equals it.
        TuckaError
            If the weight is quantised or of an unknown layout.
        ValueError
            If `safe_merge` finds a number that is not finite.

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (4).
        """
        names = [name for name in check_adapters_to_merge(cast(Any, self), adapter_names) if name in self.tucka_experts]
        if not names:
            return
        merged, updates = self._merged_weight(names, safe_merge=safe_merge)
        self.get_base_layer().weight.data.copy_(merged)
        self.tucka_merged.update(updates)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        rows = self._wide_rows(weight)
        while self.merged_adapters:
            left, right = self.tucka_merged.pop(self.merged_adapters.pop())
            rows = rows - left.to(rows.device) @ right.to(rows.device)
        weight.data.copy_(self._from_rows(rows))

    def check_merge(self, adapter_names: list[str] | None, *, safe_merge: bool) -> None:
        """Raise what `merge` would raise, and write nothing.

        Parameters
        ----------
        adapter_names : list of str or None
            As in `merge`.
        safe_merge : bool
            As in `merge`.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.tucka_experts and name not in self.merged_adapters]
        if names and safe_merge:
            self._merged_weight(names, safe_merge=True)
        elif names:
            self._mergeable_weight(names)

    @torch.no_grad()
    def _merged_weight(self, names: list[str], *, safe_merge: bool) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Compute the merged weight and each adapter's thin update of the original one; write nothing."""
        weight = self._mergeable_weight(names)
        rows, updates = self._wide_rows(weight), {}
        for name in names:
            left, right = updates[name] = self.thin_update(name, self.tucka_scope.pinned[name])
            rows = rows + left @ right
            if safe_merge and not torch.isfinite(rows.to(weight.dtype)).all():
                # PEFT's own sentence: its users look for it.
                msg = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                raise ValueError(msg)
        return self._from_rows(rows), updates

    def _mergeable_weight(self, names: list[str]) -> Tensor:
        where = self.tucka_scope.path(cast(nn.Module, self))
        for name in names:
            if name not in self.tucka_scope.pinned:
                rule = f"adapter {name!r} pinned, since the update of a routed one depends on the input"
                cure = "Pin it with tucka.peft.pin_route(model, ...) or set pinned_gates in its configuration"
                raise RouteError(expected("merge", rule, "a routed adapter", where=where, cure=cure))
        weight = self.open_weight()
        if weight is None:
            kind = type(self.get_base_layer()).__name__
            rule = "a base layer with an ordinary floating-point weight"
            cure = "Load the base in full precision to merge, or use tucka.peft.export_lora"
            raise TuckaError(expected("merge", rule, kind, where=where, cure=cure))
        return weight

    def open_weight(self) -> Tensor | None:
        """Return the base weight if it can be read as a matrix of floating-point numbers.

        Returns
        -------
        Parameter or None
            None for quantised weights, hidden ones, and layouts that are not known.
        """
        return open_weight(self.get_base_layer(), self.in_features)

    @torch.no_grad()
    def thin_update(self, name: str, gates: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return thin factors of an adapter's update of the original weight, rows being outputs.

        Parameters
        ----------
        name : str
            The adapter.
        gates : Tensor, shape (k, t)
            Fixed gates.

        Returns
        -------
        tuple of Tensor, shapes (out, r) and (r, d)
            :math:`\alpha W U` in torch's layout, one row for each output (and kernel position), and
            :math:`(U \bar G)^\top`; in float32 at least.
        """
        parts = cast(ExpertParts, self.tucka_experts[name])
        cores, expert_factor, basis = parts.factors()
        mixed = mix_cores(cores, expert_factor, gates.to(cores.device))
        dtype = torch.promote_types(mixed.dtype, basis.dtype)
        weight = self.open_weight()
        if weight is None:
            reduced = self._called_on(basis).to(dtype)
        else:
            rows = self._wide_rows(weight)
            dtype = torch.promote_types(rows.dtype, dtype)
            reduced = rows.to(dtype) @ basis.to(dtype)
            for left, right in self.tucka_merged.values():  # what other adapters added is not part of the original
                reduced = reduced - left.to(reduced) @ (right.to(reduced) @ basis.to(dtype))
        return parts.spec.alpha * reduced, (basis.to(dtype) @ mixed.to(dtype)).t().contiguous()

    def _called_on(self, basis: Tensor) -> Tensor:
        """Return W U, shape (out, r), of a linear layer that hides its weight: by calling it, without its bias."""
        base = self.get_base_layer()
        bias = getattr(base, "bias", None)
        dtype = bias.dtype if isinstance(bias, Tensor) and bias.is_floating_point() else basis.dtype
        rows = torch.cat([basis.t(), basis.new_zeros(1, basis.shape[0])]).to(dtype)
        outputs = base(rows).to(torch.promote_types(dtype, torch.float32))
        return cast(Tensor, outputs[:-1] - outputs[-1:]).t()

    def _wide_rows(self, weight: Tensor) -> Tensor:
        """View a weight as a matrix whose last axis is the adapted input axis, in float32 at least."""
        rows = weight_rows(weight, input_axis(self.get_base_layer()))
        return rows.to(torch.promote_types(weight.dtype, torch.float32))

    def _from_rows(self, rows: Tensor) -> Tensor:
        """Undo `_wide_rows`, but for the dtype."""
        base = self.get_base_layer()
        axis = input_axis(base)
        return rows.reshape(base.weight.movedim(axis, -1).shape).movedim(-1, axis)


def check_merge(model: nn.Module, adapter_names: list[str] | None, *, safe_merge: bool) -> None:
    """Look at all layers of a model before the first one is merged, so that an error leaves all of them as they were.

    Parameters
    ----------
    model : Module
        The adapted model.
    adapter_names : list of str or None
        Which adapters; the active ones if None.
    safe_merge : bool
        Whether numbers that are not finite are an error.

    Raises
    ------
    RouteError
        If an adapter is not pinned.
    TuckaError
        If a weight is quantised or of an unknown layout.
    ValueError
        If `safe_merge` finds a number that is not finite.

    Examples
    --------
    >>> check_merge(nn.Linear(2, 2), None, safe_merge=True)
    """
    for module in model.modules():
        if isinstance(module, Merging) and isinstance(module, BaseTunerLayer):
            module.check_merge(adapter_names, safe_merge=safe_merge)


def unmerge_for_a_new_adapter(model: nn.Module) -> None:
    """Unmerge, with PEFT's own warning: adding an adapter does it anyway, but too late to be undone on an error.

    Parameters
    ----------
    model : Module
        The model.

    Examples
    --------
    >>> unmerge_for_a_new_adapter(nn.Linear(2, 2))
    """
    merged = [module for module in model.modules() if isinstance(module, Merging) and module.merged]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
    for module in merged:
        module.unmerge()
