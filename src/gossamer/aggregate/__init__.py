"""Aggregation: block sums and the selective mean."""

from gossamer.aggregate.combine import Part, combine, others_median
from gossamer.aggregate.selective import SelectiveMean, label_dims, scale_rows_, selective_mean
from gossamer.aggregate.sums import TreeSum, merge, tree_sum, tree_sum_rows

__all__ = [
    "Part",
    "combine",
    "SelectiveMean",
    "TreeSum",
    "label_dims",
    "merge",
    "others_median",
    "scale_rows_",
    "selective_mean",
    "tree_sum",
    "tree_sum_rows",
]
