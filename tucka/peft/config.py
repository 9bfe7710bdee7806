"""The configuration of a TuckA adapter, in the paper's letters, as it is saved beside the weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from tucka.checks import check_choice, check_count, check_finite
from tucka.errors import CheckpointError, ConfigError, expected
from tucka.peft.files.reading import FORMAT_VERSION, check_sizes, read_entries, read_tensors
from tucka.peft.files.rollback import Loading
from tucka.peft.registration import add_peft_type
from tucka.spec import TuckerSpec

__all__ = ["TuckAConfig"]


@dataclass
class TuckAConfig(PeftConfig):
    r"""Configuration of a TuckA adapter for `peft.get_peft_model`.

    Parameters
    ----------
    r : int
        Multilinear rank of the two weight modes.
    k : int
        Expert groups.
    t : int
        Experts in one group.
    p : int
        Multilinear rank of the expert mode.
    alpha : float
        Scale of the update.
    target_modules : list of str or str, optional
        Names, or endings of names, of the layers to adapt; a string is a regular expression, or ``"all-linear"``.
    routing : {"batch", "sample", "token"}
        What one routing decision is made for. ``"batch"`` is the paper's; with ``"sample"`` an output does not depend
        on what else is in the batch.
    affinity : {"directional", "centered", "dot", "group_norm"}
        How features are compared with centroids, see `tucka.affinity_logits`; ``"dot"`` is the paper's.
    temperature : float
        Divides the logits before the sigmoid; lower makes the gates of a group differ more.
    router_init : {None, "balanced", "dai", "kaiming"}
        How `initialize_router` starts the router from data. ``"balanced"`` needs an affinity with a centre. None
        stands for it there, and for the paper's ``"dai"`` with ``"dot"`` and ``"group_norm"``.
    balance_rate : float
        γ of a bias on the choice of groups that is moved against their load after each training step, see
        `balance_router`; 0 for none.
    gate_norm : bool
        Whether the gates of the chosen group sum to one (Eq. 8).
    factor_norm : {None, "frobenius"}
        ``"frobenius"`` divides the factors by their norms, as the authors' code does.
    pinned_gates : list of list of float, optional
        Fixed gates (k, t). The adapter then has no router and can be merged.
    keeps_router : bool
        Whether an adapter with pinned gates has its router too, frozen, as `pin_route` leaves it.
    route_tokens : {"all", "prompt", "padded"}
        Which tokens the routing feature averages. ``"prompt"`` stops before the first label that counts; ``"padded"``
        counts padding too, as the authors' code does.
    router_module : str, optional
        Name, or ending of the name, of the adapted layer whose input is routed on; the first one that runs if None.
    router_seed : int
        Of the router's start and of its data-aware initialisation.
    sync_routing : bool
        Whether data-parallel ranks take one common decision in training with batch routing.
    init_weights : bool
        Whether the adapted model starts equal to the base.
    exclude_modules : list of str or str, optional
        Layers to leave out.
    layers_to_transform : list of int or int, optional
        Indices of the blocks to adapt.
    layers_pattern : list of str or str, optional
        Name of the list of blocks.
    modules_to_save : list of str, optional
        Other modules to train and save whole, such as a classification head.
    bias : {"none", "all", "tucka_only"}
        Which biases to train.
    tucka_format : int
        Version of the file format; written on saving, checked on loading.

    Raises
    ------
    ConfigError
        If a number or an option is outside its rule.

    References
    ----------
    .. [1] arXiv:2511.06859, Section 3.

    Examples
    --------
    >>> TuckAConfig(r=4, k=3, target_modules=["query", "value"]).spec.num_experts
    6
    """

    r: int = field(default=8, metadata={"help": "Multilinear rank of the two weight modes."})
    k: int = field(default=2, metadata={"help": "Number of expert groups."})
    t: int = field(default=2, metadata={"help": "Experts in one group."})
    p: int = field(default=2, metadata={"help": "Multilinear rank of the expert mode."})
    alpha: float = field(default=1.0, metadata={"help": "Scale of the update."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to adapt."})
    routing: str = field(default="batch", metadata={"help": "'batch', 'sample' or 'token'."})
    affinity: str = field(default="directional", metadata={"help": "How features are compared with centroids."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the router's logits."})
    router_init: str | None = field(default=None, metadata={"help": "'balanced', 'dai' or 'kaiming'."})
    balance_rate: float = field(default=0.0, metadata={"help": "Step of the bias on the choice, against the load."})
    gate_norm: bool = field(default=True, metadata={"help": "Whether a group's gates sum to one."})
    factor_norm: str | None = field(default=None, metadata={"help": "'frobenius' for the authors' variant."})
    pinned_gates: list[list[float]] | None = field(default=None, metadata={"help": "A fixed route (k, t)."})
    keeps_router: bool = field(default=False, metadata={"help": "Whether a pinned adapter has its router too."})
    route_tokens: str = field(default="all", metadata={"help": "'all', 'prompt' or 'padded'."})
    router_module: str | None = field(default=None, metadata={"help": "The layer whose input is routed on."})
    router_seed: int = field(default=0, metadata={"help": "Seed of the router's start."})
    sync_routing: bool = field(default=True, metadata={"help": "One common decision of data-parallel ranks."})
    init_weights: bool = field(default=True, metadata={"help": "Start equal to the base model."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'tucka_only'."})
    tucka_format: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the file format."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loading: Loading | None = None  # no field: it is not saved
        self.peft_type = add_peft_type("TUCKA")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.spec  # noqa: B018 - validates the sizes
        check_choice("route_tokens", self.route_tokens, ("all", "prompt", "padded"), where="TuckAConfig")
        check_choice("bias", self.bias, ("none", "all", "tucka_only"), where="TuckAConfig")
        check_count("router_seed", self.router_seed, least=0, where="TuckAConfig")
        self._check_layers()
        self._check_pinned()
        if check_count("tucka_format", self.tucka_format, where="TuckAConfig") > FORMAT_VERSION:
            rule = f"a format this tucka knows, at most {FORMAT_VERSION}"
            raise ConfigError(
                expected("tucka_format", rule, self.tucka_format, where="TuckAConfig", cure="Update tucka")
            )

    def _check_layers(self) -> None:
        where = "TuckAConfig"
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            rule = "None where target_modules is a pattern"
            raise ConfigError(expected("layers_to_transform", rule, self.layers_to_transform, where=where))
        if self.layers_pattern and self.layers_to_transform is None:
            rule = "indices where layers_pattern is given"
            raise ConfigError(expected("layers_to_transform", rule, None, where=where))

    def _check_pinned(self) -> None:
        if self.pinned_gates is None:
            return
        rows: Any = self.pinned_gates
        fits = isinstance(rows, (list, tuple)) and len(rows) == self.k
        if not fits or any(not isinstance(row, (list, tuple)) or len(row) != self.t for row in rows):
            rule = f"{self.k} lists of {self.t} numbers (k, t)"
            raise ConfigError(expected("pinned_gates", rule, rows, where="TuckAConfig"))
        self.pinned_gates = [[check_finite("pinned_gates", gate, where="TuckAConfig") for gate in row] for row in rows]

    @classmethod
    def read(cls, folder: str | Path) -> TuckAConfig:
        """Read a configuration from a folder that need not be trusted.

        Parameters
        ----------
        folder : str or Path
            Has ``adapter_config.json``.

        Returns
        -------
        TuckAConfig
            The configuration.

        Raises
        ------
        CheckpointError
            If it is missing, unreadable, of another method or format version, or holds impossible values.
        """
        entries = read_entries(folder)
        unknown = [name for name in entries if name not in cls.__dataclass_fields__]
        if unknown:
            message = expected("config", "entries that this tucka knows", ", ".join(unknown), where=str(folder))
            warnings.warn(f"{message}. They are left out", stacklevel=2)
        try:
            return cls(**{name: value for name, value in entries.items() if name not in unknown})
        except (TypeError, ValueError) as error:
            raise CheckpointError(expected("config", "possible values", str(error), where=str(folder))) from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> TuckAConfig:
        """Load a configuration as PEFT does; where it is in a local folder, check it and the tensors beside it first.

        PEFT calls this before it changes a model, so a damaged adapter leaves the model as it was.

        Parameters
        ----------
        pretrained_model_name_or_path : str or Path
            A folder, or a repository of the Hub.
        subfolder : str, optional
            Of that.
        **kwargs : object
            PEFT's further arguments.

        Returns
        -------
        TuckAConfig
            The configuration.

        Raises
        ------
        CheckpointError
            If a local file is damaged, of another method or an unknown format version, or holds NaN.
        """
        folder, tensors = Path(pretrained_model_name_or_path) / (subfolder or ""), None
        if (folder / CONFIG_NAME).is_file():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns of unknown entries itself
                spec = cls.read(folder).spec
            if any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
                tensors = read_tensors(folder, allow_pickle=True)  # as PEFT: torch's reader runs no code
                check_sizes(tensors, spec, str(folder))
        config = cast(TuckAConfig, super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs))
        config.loading = None if tensors is None else Loading(tensors)
        return config

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what only a running load needs: it refers to the model."""
        return {**vars(self), "loading": None}

    @property
    def spec(self) -> TuckerSpec:
        """The sizes and options in the library's own words, validated.

        Returns
        -------
        TuckerSpec
            For `tucka.backends.torch`.
        """
        return TuckerSpec(
            rank=self.r,
            groups=self.k,
            experts_per_group=self.t,
            expert_rank=self.p,
            alpha=self.alpha,
            routing=self.routing,  # type: ignore[arg-type]
            affinity=self.affinity,  # type: ignore[arg-type]
            temperature=self.temperature,
            balance_rate=self.balance_rate,
            router_init=self.router_init,  # type: ignore[arg-type]
            gate_norm=self.gate_norm,
            factor_norm=self.factor_norm,  # type: ignore[arg-type]
        )
