"""The column "# Par." of the paper's Tables 1 to 3, counted again from the sizes that it states."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from tucka.core.counts import count_parameters
from tucka.core.counts.costs import Layer

__all__ = ["MODEL_LAYERS", "PaperCell", "paper_counts"]

# The targets query, value and all dense layers: of a block these are query, value, the attention's output and both
# layers of the feed-forward part.
_BASE_BLOCK: tuple[Layer, ...] = ((768, 768), (768, 768), (768, 768), (768, 3072), (3072, 768))

MODEL_LAYERS: Mapping[str, tuple[Layer, ...]] = MappingProxyType(
    {
        # With the dense layer of its pooler, which stands in front of the classifier; ViT has none there.
        "DeBERTa-v3-base": (*_BASE_BLOCK * 12, (768, 768)),
        "ViT-base": _BASE_BLOCK * 12,
        # Query and value only.
        "Llama2-7B": ((4096, 4096),) * 2 * 32,
    }
)

_LARGEST_SIZE = 4096  # that `other_sizes` tries
_OFT = {"block_size": 8, "variant": "paper"}
_TABLES: tuple[tuple[int, str, tuple[tuple[str, Mapping[str, Any], str], ...]], ...] = (
    (
        1,
        "DeBERTa-v3-base",
        (
            ("lora", {"r": 8}, "1.19M"),
            ("dora", {"r": 8}, "1.27M"),
            ("vera", {"r": 1024}, "0.23M"),
            ("oft", _OFT, "0.67M"),
            ("boft", _OFT, "0.67M"),
            ("hra", {"r": 8}, "0.60M"),
            ("tucka", {"r": 2, "k": 4, "t": 2, "p": 2}, "0.16M"),
            ("tucka", {"r": 6, "k": 2, "t": 2, "p": 2}, "0.46M"),
            ("tucka", {"r": 8, "k": 2, "t": 2, "p": 2}, "0.64M"),
        ),
    ),
    (
        2,
        "ViT-base",
        (
            ("lora", {"r": 8}, "1.18M"),
            ("dora", {"r": 8}, "1.25M"),
            ("vera", {"r": 512}, "0.10M"),
            ("oft", _OFT, "0.66M"),
            ("boft", _OFT, "0.66M"),
            ("hra", {"r": 8}, "0.59M"),
            ("tucka", {"r": 2, "k": 5, "t": 2, "p": 2}, "0.16M"),
            ("tucka", {"r": 6, "k": 1, "t": 2, "p": 2}, "0.45M"),
            ("tucka", {"r": 8, "k": 1, "t": 2, "p": 2}, "0.60M"),
        ),
    ),
    (
        3,
        "Llama2-7B",
        (
            ("lora", {"r": 32}, "16.8M"),
            ("dora", {"r": 32}, "17.0M"),
            ("tucka", {"r": 16, "k": 4, "t": 2, "p": 2}, "4.4M"),
            ("tucka", {"r": 32, "k": 4, "t": 2, "p": 2}, "10.7M"),
        ),
    ),
)


@dataclass(frozen=True)
class PaperCell:
    """One cell of the column "# Par.".

    Parameters
    ----------
    table : int
        1, 2 or 3.
    model : str
        A name in `MODEL_LAYERS`.
    method : str
        A name that `tucka.count_parameters` knows.
    sizes : mapping
        The sizes that the paper states; its two sizes without a figure in the tables, t and p, are 2.
    figure : str
        What the paper prints.
    count : int
        What the sizes give.

    Examples
    --------
    >>> PaperCell(2, "ViT-base", "hra", {"r": 8}, "0.59M", 589824).agrees
    True
    >>> [cell.other_sizes() for cell in paper_counts() if cell.method == "vera"]
    [({'r': 2468},), ()]
    """

    table: int
    model: str
    method: str
    sizes: Mapping[str, Any]
    figure: str
    count: int

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest count that round to the printed figure."""
        printed = Decimal(self.figure.removesuffix("M"))
        half = Decimal(5).scaleb(int(printed.as_tuple().exponent) - 1)
        return int((printed - half) * 10**6), int((printed + half) * 10**6)

    @property
    def agrees(self) -> bool:
        """Whether the count rounds to the printed figure: true for all cells but three."""
        least, most = self.bounds
        return least <= self.count <= most

    def other_sizes(self) -> tuple[dict[str, Any], ...]:
        """Find sizes that give the printed figure, where the stated ones do not.

        Returns
        -------
        tuple of dict
            For each size that alone can give the figure: all sizes, with its value nearest to the stated one.

        Examples
        --------
        >>> cell = next(cell for cell in paper_counts() if not cell.agrees)
        >>> cell.model, cell.method, cell.other_sizes()
        ('DeBERTa-v3-base', 'vera', ({'r': 2468},))
        """
        if self.agrees:
            return ()
        found = []
        for name, stated in self.sizes.items():
            value = self._value_that_fits(name) if isinstance(stated, int) else None
            if value is not None:
                found.append({**self.sizes, name: value})
        return tuple(found)

    def _value_that_fits(self, name: str) -> int | None:
        """Bisect for the value of one size nearest to the stated one: counts grow with every size."""
        layers = MODEL_LAYERS[self.model]
        values = range(1, _LARGEST_SIZE + 1)

        def count(value: int) -> int:
            return count_parameters(self.method, layers, **{**self.sizes, name: value})

        least, largest = self.bounds
        first = bisect_left(values, least, key=count)
        past = bisect_left(values, largest + 1, key=count)
        fitting = values[first:past]
        return min(fitting, key=lambda value: abs(value - self.sizes[name]), default=None)


def paper_counts() -> tuple[PaperCell, ...]:
    """Count every cell of the column "# Par." in the paper's Tables 1 to 3.

    All but three agree with the paper to its printed digits. The three are VeRA on DeBERTa-v3-base and the largest
    TuckA on DeBERTa-v3-base and on Llama2-7B; `PaperCell.other_sizes` says which sizes would give the figures printed.

    Returns
    -------
    tuple of PaperCell
        In the paper's order, classification heads not counted.

    References
    ----------
    .. [1] arXiv:2511.06859, Tables 1, 2 and 3; counted with the parameters of Eq. (5) and (6).

    Examples
    --------
    >>> [(cell.model, cell.figure, cell.count) for cell in paper_counts() if not cell.agrees]
    [('DeBERTa-v3-base', '0.23M', 136960), ('DeBERTa-v3-base', '0.64M', 614900), ('Llama2-7B', '10.7M', 8945920)]
    """
    return tuple(
        PaperCell(table, model, method, sizes, figure, count_parameters(method, MODEL_LAYERS[model], **sizes))
        for table, model, cells in _TABLES
        for method, sizes, figure in cells
    )
