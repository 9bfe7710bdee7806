"""The configuration of a TuckA adapter, in the paper's letters, as it is saved beside the weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME

from tucka.checks import check_choice, check_count, check_finite, refuse_unknown_keywords
from tucka.errors import CheckpointError, ConfigError, expected
from tucka.peft.files.reading import FORMAT_VERSION, read_entries
from tucka.peft.registration import add_peft_type
from tucka.spec import (
    LETTERS,
    OTHER_WORDS,
    Affinity,
    FactorNorm,
    RouterInit,
    Routing,
    TuckerSpec,
    check_spec,
)

__all__ = ["TuckAConfig"]

_WHERE = "TuckAConfig"


@refuse_unknown_keywords({**LETTERS, **OTHER_WORDS})
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
    routing : {None, "batch", "sample", "token", "given"}
        What one routing decision is made for. None stands for ``"token"`` in decoder-only language models and for
        ``"sample"`` in others; the choice is made when the adapter is added, and saved. ``"batch"`` is the paper's: an
        output then depends on what else is in the batch. ``"given"``: the caller says it (`given_route`), no router.
    affinity : {"directional", "centered", "dot", "group_norm"}
        How features are compared with centroids, see `tucka.affinity_logits`; ``"dot"`` is the paper's.
    temperature : float
        Divides the logits before the sigmoid; lower makes the gates of a group differ more.
    router_init : {None, "balanced", "dai", "kaiming"}
        How `initialize_router` starts the router from data. ``"balanced"`` needs an affinity with a centre. None
        stands for it there, and for the paper's ``"dai"`` with ``"dot"`` and ``"group_norm"``.
    balance_rate : float
        Step γ of a bias on the choice of groups, which moves against their load after each training step, see
        `balance_router`; 0 for none.
    gate_norm : bool
        Whether the gates of the chosen group sum to one (Eq. 8).
    factor_norm : {None, "frobenius"}
        ``"frobenius"`` divides the factors by their norms, as the authors' code does.
    group_names : list of str, optional
        A name for each group, by which `given_route` and `pin_route` know it.
    pinned_gates : array_like, shape (k, t), optional
        Fixed gates. The adapter then has no router and can be merged.
    keeps_router : bool
        Whether an adapter with pinned gates has its router too, frozen, as `pin_route` leaves it.
    route_tokens : {"all", "prompt", "padded"}
        Which tokens the routing feature averages. ``"prompt"`` stops before the first label that counts; ``"padded"``
        counts padding too, as the authors' code does.
    router_module : str, optional
        Name, or ending of the name, of the adapted layer whose input is routed on; the first one that runs if None.
    router_seed : int
        Of the router's start and of its data-aware initialisation.
    samples_first : bool, optional
        Whether the first axis of all layers' inputs counts samples; False where it counts tokens and the second one
        samples. None for what the classes of the model tell.
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
        If a number or an option is outside its rule, or a keyword is unknown.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5) for the sizes and Eq. (6) to (10) for the options.

    Examples
    --------
    >>> TuckAConfig(r=4, k=3, target_modules=["query", "value"]).spec.num_experts
    6
    """

    r: int = field(default=TuckerSpec.rank, metadata={"help": "Multilinear rank of the two weight modes."})
    k: int = field(default=TuckerSpec.groups, metadata={"help": "Number of expert groups."})
    t: int = field(default=TuckerSpec.experts_per_group, metadata={"help": "Experts in one group."})
    p: int = field(default=TuckerSpec.expert_rank, metadata={"help": "Multilinear rank of the expert mode."})
    alpha: float = field(default=TuckerSpec.alpha, metadata={"help": "Scale of the update."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to adapt."})
    routing: Routing | Literal["given"] | None = field(
        default=None, metadata={"help": "'batch', 'sample', 'token', 'given', or None to choose by the model."}
    )
    affinity: Affinity = field(
        default=TuckerSpec.affinity, metadata={"help": "How features are compared with centroids."}
    )
    temperature: float = field(default=TuckerSpec.temperature, metadata={"help": "Divides the router's logits."})
    router_init: RouterInit | None = field(
        default=TuckerSpec.router_init, metadata={"help": "'balanced', 'dai' or 'kaiming'."}
    )
    balance_rate: float = field(
        default=TuckerSpec.balance_rate, metadata={"help": "Step of the bias on the choice, against the load."}
    )
    gate_norm: bool = field(default=TuckerSpec.gate_norm, metadata={"help": "Whether a group's gates sum to one."})
    factor_norm: FactorNorm | None = field(
        default=TuckerSpec.factor_norm, metadata={"help": "'frobenius' for the authors' variant."}
    )
    group_names: list[str] | None = field(default=None, metadata={"help": "Names of the groups."})
    pinned_gates: list[list[float]] | None = field(default=None, metadata={"help": "A fixed route (k, t)."})
    keeps_router: bool = field(default=False, metadata={"help": "Whether a pinned adapter has its router too."})
    route_tokens: str = field(default="all", metadata={"help": "'all', 'prompt' or 'padded'."})
    router_module: str | None = field(default=None, metadata={"help": "The layer whose input is routed on."})
    router_seed: int = field(default=0, metadata={"help": "Seed of the router's start."})
    samples_first: bool | None = field(default=None, metadata={"help": "Whether axis 0 of inputs counts samples."})
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
        self.peft_type = add_peft_type("TUCKA")
        check_choice("routing", self.routing, (None, "batch", "sample", "token", "given"), where=_WHERE)
        for name, value in self._checked_spec().items():
            if name != "routing":
                setattr(self, LETTERS.get(name, name), value)
        self._check_options()
        self._check_layers()
        self._check_pinned()

    def _checked_spec(self) -> dict[str, Any]:
        """Return the fields of the `TuckerSpec`, checked in the words of this class."""
        given = {item.name: getattr(self, LETTERS.get(item.name, item.name)) for item in fields(TuckerSpec)}
        if given["routing"] in (None, "given"):  # gates for each sample, whoever makes them
            given["routing"] = "sample"
        return check_spec(given, words=LETTERS, where=_WHERE)

    def _check_options(self) -> None:
        check_choice("route_tokens", self.route_tokens, ("all", "prompt", "padded"), where=_WHERE)
        check_choice("bias", self.bias, ("none", "all", "tucka_only"), where=_WHERE)
        for name in ("keeps_router", "sync_routing", "init_weights"):
            setattr(self, name, check_choice(name, getattr(self, name), (True, False), where=_WHERE))
        check_choice("samples_first", self.samples_first, (None, True, False), where=_WHERE)
        self._check_group_names()
        self.router_seed = check_count("router_seed", self.router_seed, least=0, where=_WHERE)
        self.tucka_format = check_count("tucka_format", self.tucka_format, where=_WHERE)
        if self.tucka_format > FORMAT_VERSION:
            rule = f"a format this tucka knows, at most {FORMAT_VERSION}"
            raise ConfigError(expected("tucka_format", rule, self.tucka_format, where=_WHERE, cure="Update tucka"))

    def _check_group_names(self) -> None:
        names = self.group_names
        if names is None:
            return
        fits = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
        if not fits or len(set(names)) != len(names) or len(names) != self.k:
            rule = f"{self.k} different names, one for each group"
            raise ConfigError(expected("group_names", rule, repr(names), where=_WHERE))
        self.group_names = list(names)

    def _check_layers(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self.layers_to_transform = _plain(self.layers_to_transform)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            rule = "None where target_modules is a pattern"
            raise ConfigError(expected("layers_to_transform", rule, self.layers_to_transform, where=_WHERE))
        if self.layers_pattern and self.layers_to_transform is None:
            rule = "indices where layers_pattern is given"
            raise ConfigError(expected("layers_to_transform", rule, None, where=_WHERE))

    def _check_pinned(self) -> None:
        if self.pinned_gates is None:
            return
        rows = _plain(self.pinned_gates)
        fits = isinstance(rows, list) and len(rows) == self.k
        if not fits or any(not isinstance(row, list) or len(row) != self.t for row in rows):
            rule = f"{self.k} lists of {self.t} numbers (k, t)"
            raise ConfigError(expected("pinned_gates", rule, self.pinned_gates, where=_WHERE))
        self.pinned_gates = [[check_finite("pinned_gates", gate, where=_WHERE) for gate in row] for row in rows]

    @property
    def spec(self) -> TuckerSpec:
        """The sizes and options in the library's own words, checked again: fields can be set at any time."""
        return TuckerSpec(**self._checked_spec())

    @property
    def has_router(self) -> bool:
        """Whether an adapter has a router."""
        return self.routing != "given" and (self.pinned_gates is None or self.keeps_router)

    def resolved(self, *, decoder_only: bool) -> TuckAConfig:
        """Return a copy for one model, in which all that depends on the model is decided."""
        if self.modules_to_save is None and self.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            self.modules_to_save = []  # PEFT adds the head to this list afterwards, so the copy must share it
        config = copy.copy(self)
        if config.routing is None:
            config.routing = "token" if decoder_only else "sample"
        if config.k == config.t == config.p == 1 and config.gate_norm and config.pinned_gates is None:
            config.pinned_gates = [[1.0]]  # the only route that there is
        return config

    @classmethod
    def paper(cls, *, r: int, k: int, **options: Any) -> TuckAConfig:
        """Return the setting of the paper: one route for a batch, dot products, data-aware initialisation, t = p = 2.

        Parameters
        ----------
        r : int
            Multilinear rank of the two weight modes.
        k : int
            Expert groups.
        **options : object
            Further arguments of this class, such as ``target_modules``.

        Returns
        -------
        TuckAConfig
            The configuration.

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (6) to (10) and the section on experiments.

        Examples
        --------
        >>> config = TuckAConfig.paper(r=2, k=4, target_modules=["query", "value"])
        >>> config.routing, config.affinity, config.router_init, config.t, config.p
        ('batch', 'dot', 'dai', 2, 2)
        """
        setting = {"routing": "batch", "affinity": "dot", "router_init": "dai", "t": 2, "p": 2}
        return cls(**{"r": r, "k": k, **setting, **options})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> TuckAConfig:
        """Load a configuration as PEFT does; whatever is wrong in a local folder is one CheckpointError."""
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if not (folder / CONFIG_NAME).is_file():
            return cast(TuckAConfig, super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs))
        entries = read_entries(folder)
        known = {name: value for name, value in entries.items() if name in cls.__dataclass_fields__}
        if len(known) < len(entries):
            unknown = ", ".join(name for name in entries if name not in known)
            message = expected("config", "entries that this tucka knows", unknown, where=str(folder))
            warnings.warn(f"{message}. They are left out", stacklevel=2)
        try:
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise CheckpointError(expected("config", "possible values", str(error), where=str(folder))) from error


def _plain(value: Any) -> Any:
    """Turn arrays, tensors, tuples and their numbers into lists and numbers that JSON can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
