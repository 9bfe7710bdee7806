"""The configuration of a TuckA adapter, in the paper's letters, as it is saved beside the weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key

from tucka.checks import check_choice, refuse_unknown_keywords
from tucka.errors import CheckpointError, expected
from tucka.peft.config_checks import check_fields
from tucka.peft.files.card import write_card
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


# Fields of other methods' configurations.
_OF_OTHERS = {
    "lora_dropout": "dropout",
    "init_lora_weights": "init_weights",
    "target_parameters": "Name the module that holds the parameters in target_modules: in a mixture its 'experts', "
    "whose inputs are adapted together",
    "fan_in_fan_out": "Leave it out: layers whose weight is turned are known by their class",
    "use_rslora": "Leave it out, and set alpha: the update is not divided by the rank",
    "use_dora": "Leave it out: the weight is not decomposed",
    "layer_replication": "Leave it out: an adapter does not repeat layers of its base",
}


@refuse_unknown_keywords({**LETTERS, **OTHER_WORDS, **_OF_OTHERS})
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
    rank_pattern, alpha_pattern : dict, optional
        Layers, by their names, endings of names or regular expressions, whose `r` or `alpha` is another one.
    dropout : float
        The share of the update's inputs that training leaves out at random. The route sees all of them.
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
    factor_norm : {"auto", "rotation", "columns", None, "frobenius"}
        How the update is kept from growing. ``"rotation"``: all experts have a rotation in common, which the basis
        gives (`tucka.rotation_core`), and each adds its own part. ``"columns"`` keeps the columns of the basis shorter
        than one (`tucka.soft_unit_columns`). None is the paper's. ``"frobenius"`` divides the factors by their norms,
        as the authors' code does. ``"auto"`` stands for ``"columns"`` with ``routing="given"``, where the groups are to
        have nothing in common but the basis, and else for ``"rotation"``.
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
    input_names : dict, optional
        What arguments of a model of your own are, by their names in its ``forward``: ``"attention_mask"``,
        ``"key_padding_mask"`` (true where a token is padding), ``"position_ids"``, ``"cu_seq_lens_q"`` or ``"other"``.
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
    trainable_token_indices : list of int or dict of str to list of int, optional
        Rows of the embeddings to train too, as in PEFT's LoRA; a dict says in which layers.
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
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Layers with another r."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Layers with another alpha."})
    dropout: float = field(default=0.0, metadata={"help": "Share of the update's inputs that training leaves out."})
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
    factor_norm: FactorNorm | Literal["auto"] | None = field(
        default="auto", metadata={"help": "'rotation', 'columns', None, 'frobenius', or 'auto' to choose."}
    )
    group_names: list[str] | None = field(default=None, metadata={"help": "Names of the groups."})
    pinned_gates: list[list[float]] | None = field(default=None, metadata={"help": "A fixed route (k, t)."})
    keeps_router: bool = field(default=False, metadata={"help": "Whether a pinned adapter has its router too."})
    route_tokens: str = field(default="all", metadata={"help": "'all', 'prompt' or 'padded'."})
    router_module: str | None = field(default=None, metadata={"help": "The layer whose input is routed on."})
    router_seed: int = field(default=0, metadata={"help": "Seed of the router's start."})
    samples_first: bool | None = field(default=None, metadata={"help": "Whether axis 0 of inputs counts samples."})
    input_names: dict[str, str] = field(default_factory=dict, metadata={"help": "What a model's own arguments are."})
    sync_routing: bool = field(default=True, metadata={"help": "One common decision of data-parallel ranks."})
    init_weights: bool = field(default=True, metadata={"help": "Start equal to the base model."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embeddings to train too."}
    )
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'tucka_only'."})
    tucka_format: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the file format."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("TUCKA")
        check_choice("routing", self.routing, (None, "batch", "sample", "token", "given"), where=_WHERE)
        for name, value in self._checked_spec().items():
            if name != "routing" and getattr(self, name, None) != "auto":
                setattr(self, LETTERS.get(name, name), value)
        check_fields(self)

    def _checked_spec(self) -> dict[str, Any]:
        """Return the fields of the `TuckerSpec`, checked in the words of this class."""
        given = {item.name: getattr(self, LETTERS.get(item.name, item.name)) for item in fields(TuckerSpec)}
        check_choice("factor_norm", given["factor_norm"], ("auto", None, *get_args(FactorNorm)), where=_WHERE)
        if given["factor_norm"] == "auto":
            given["factor_norm"] = "columns" if given["routing"] == "given" else TuckerSpec.factor_norm
        if given["routing"] in (None, "given"):  # gates for each sample, whoever makes them
            given["routing"] = "sample"
        return check_spec(given, words=LETTERS, where=_WHERE)

    @property
    def spec(self) -> TuckerSpec:
        """The sizes and options in the library's own words, checked again: fields can be set at any time."""
        return TuckerSpec(**self._checked_spec())

    def spec_for(self, layer: str) -> TuckerSpec:
        """The sizes of one layer, by its name: those of the patterns that match it, where there are any."""
        spec = self.spec
        rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern, layer), spec.rank)
        alpha = self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, layer), spec.alpha)
        return spec if (rank, alpha) == (spec.rank, spec.alpha) else replace(spec, rank=rank, alpha=alpha)

    @property
    def has_router(self) -> bool:
        """Whether an adapter has a router."""
        return self.routing != "given" and (self.pinned_gates is None or self.keeps_router)

    def resolved(self, *, decoder_only: bool) -> TuckAConfig:
        """Return a copy for one model in which all that depends on it is decided; itself where nothing does."""
        names_layers = self.target_modules not in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND)
        if names_layers and self.routing is not None and (self.k, self.t, self.p) != (1, 1, 1):
            self.factor_norm = self.spec.factor_norm  # the same for all models; PEFT's users expect their own object
            return self
        if self.modules_to_save is None and self.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            self.modules_to_save = []  # PEFT adds the head to this list afterwards, so the copy must share it
        config = copy.copy(self)
        if config.routing is None:
            config.routing = "token" if decoder_only else "sample"
        config.factor_norm = config.spec.factor_norm
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
        >>> config.routing, config.affinity, config.router_init, config.factor_norm, config.t, config.p
        ('batch', 'dot', 'dai', None, 2, 2)
        """
        setting = {"routing": "batch", "affinity": "dot", "router_init": "dai", "factor_norm": None, "t": 2, "p": 2}
        return cls(**{"r": r, "k": k, **setting, **options})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the configuration as PEFT does, with a model card where an adapter's tensors are saved already."""
        super().save_pretrained(str(save_directory), **kwargs)
        write_card(Path(save_directory), self.to_dict())

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
