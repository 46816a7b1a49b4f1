"""Selective mean: every coordinate is averaged over the participants that hold it.

FedRolex (arXiv 2212.01548, Eq. 4) and HeteroFL: ``theta_k <- sum_n w_n theta_{n,k} / sum_n w_n`` over the n
that hold k; coordinates that nobody holds keep their bits.
Rows of label axes count only for clients that own the label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.submodel import LABEL_AXIS, Axes, Cut, Layout, SubModel, count_shapes, cut_of, layout_of

Contribution = tuple[SubModel, float, Sequence[int] | Tensor | None]


def label_dims(layout: Layout) -> dict[str, int]:
    """Return ``{parameter: position of its label dimension}`` of the parameters that have one."""
    return {name: at for name, (at, _) in layout.label_dims.items()}


def scale_rows_(layout: Layout, rows: Tensor, weights: Tensor, label_weights: Tensor | None) -> Tensor:
    """Multiply rows [s, d] in place by the clients' weights [s], label rows by their weights per label [s, num_labels].

    Labels of several axes are numbered as `Layout.labels` says. Weight 0 gives exactly 0 for finite rows, which is what
    a client without the label contributes.
    """
    if label_weights is None:
        return rows.mul_(weights[:, None])
    for name, view in layout.views(rows).items():
        ones = (1,) * (view.dim() - 1)
        if name in layout.label_dims:
            ahead, own = layout.label_dims[name]
            behind = view.dim() - ahead - 2
            view.mul_(label_weights[:, own].reshape(len(rows), *(1,) * ahead, -1, *(1,) * behind))
        else:
            view.mul_(weights.view(-1, *ones))
    return rows


class SelectiveMean:
    """Running numerators and denominators of a selective mean, in full coordinates.

    Denominators do not vary along dimensions without an axis (kernels), so they are kept without them.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
        self._layout = layout
        self._numerator = torch.zeros(layout.d, dtype=dtype)
        self._sums = layout.views(self._numerator)
        self._counts = {
            name: torch.zeros(shape, dtype=dtype)
            for name, shape in zip(layout.names, count_shapes(layout), strict=True)
        }

    def add(self, cut: Cut, weighted_sum: Tensor, weight: float, label_weights: Tensor | None = None) -> None:
        """Add a flat sum of weighted rows [d_sub] of participants that share `cut`.

        Args:
            weight: their total weight.
            label_weights: [num_labels], their total weight per label, or None.
        """
        cut.add_(self._numerator, weighted_sum)
        self._count(cut, weight, label_weights)

    def add_params(self, cut: Cut, params: Mapping[str, Tensor], weight: float, owned: Tensor | None = None) -> None:
        """Add one participant's weighted tensors; `owned` is a bool mask [num_labels] of its labels, or None."""
        label_weights = None if owned is None else owned.float() * weight
        for piece in cut.pieces:
            addend, factor = params[piece.name], weight
            if label_weights is not None and piece.name in self._layout.label_dims:
                addend, factor = addend * self._label_view(piece.name, label_weights), 1.0
            piece.add(self._sums[piece.name], addend, factor)
        self._count(cut, weight, label_weights)

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Return the mean [d], 0 where nobody holds a coordinate, and a bool mask [d] of those held; None: all are."""
        if all(bool((count > 0).all()) for count in self._counts.values()):
            for name, total in self._sums.items():
                total.div_(self._counts[name])
            return self._numerator, None
        held = torch.zeros(self._layout.d, dtype=torch.bool)
        for name, view in self._layout.views(held).items():
            has_holder = self._counts[name] > 0
            view.copy_(has_holder.expand_as(view))
            self._sums[name].div_(torch.where(has_holder, self._counts[name], 1.0))
        return self._numerator, held

    def _count(self, cut: Cut, weight: float, label_weights: Tensor | None) -> None:
        for piece in cut.count_pieces:
            addend: Tensor | float = weight
            if label_weights is not None and piece.name in self._layout.label_dims:
                addend = self._label_view(piece.name, label_weights)
            piece.fill_add(self._counts[piece.name], addend)

    def _label_view(self, name: str, label_weights: Tensor) -> Tensor:
        at, own = self._layout.label_dims[name]
        return label_weights[own].view(-1, *(1,) * (self._counts[name].dim() - at - 1))


@torch.no_grad()
def selective_mean(
    params: Mapping[str, Tensor], axes: Axes, contributions: Iterable[Contribution]
) -> dict[str, Tensor]:
    """Average sub-models into `params`.

    Args:
        params: ``{name: float32 tensor}``, the global model.
        axes: ``{name: (axis, ...)}``.
        contributions: (sub-model, weight > 0, labels); labels are the label numbers that the client owns, a bool
            mask over all labels, or None for all of them. Their order changes the result by float32 rounding only.

    Returns:
        New tensors; coordinates held by nobody are bit-identical to `params`.

    Raises:
        ConfigError: a weight that is not positive and finite, or a label out of range.
    """
    layout = layout_of(params, axes)
    num_labels = layout.num_labels
    total = SelectiveMean(layout)
    for sub, weight, labels in contributions:
        if not (0 < weight < float("inf")):
            raise ConfigError(
                f"weight {weight!r} of a contribution is not positive and finite: give its number of samples"
            )
        owned = None if labels is None else label_mask(labels, num_labels)
        total.add_params(cut_of(layout, sub.windows), sub.params, float(weight), owned)
    mean, held = total.result()
    averaged = layout.views(mean)
    if held is None:
        return averaged
    return {name: torch.where(mask, averaged[name], params[name]) for name, mask in layout.views(held).items()}


def label_mask(labels: Sequence[int] | Tensor, num_labels: int) -> Tensor:
    """Return a bool mask [num_labels] from label numbers or a mask.

    Raises:
        ConfigError: a label outside 0..num_labels-1, a mask of another shape, or no parameter has a label axis.
    """
    given = torch.as_tensor(labels)
    if given.dtype == torch.bool:
        if given.shape != (num_labels,):
            raise ConfigError(
                f"mask of shape {tuple(given.shape)} does not fit {num_labels} labels: give one bool each"
            )
        return given
    mask = torch.zeros(num_labels, dtype=torch.bool)
    for label in given.long().tolist():
        if not 0 <= label < num_labels:
            raise ConfigError(f"label {label!r} is outside 0..{num_labels - 1}: check the axis named {LABEL_AXIS!r}")
        mask[label] = True
    return mask
