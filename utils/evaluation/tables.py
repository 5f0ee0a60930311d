"""Qualities of images from a column of a CSV."""

import numpy as np
from numpy.typing import NDArray

from utils.evaluation.breakdown import ColumnsError, read_columns
from utils.evaluation.test_sets import TestSet, keys_of


def qualities_by(file: str, column: str, test_set: TestSet) -> NDArray[np.float64]:
    """The numbers of `column` for each image of the set, NaN where the CSV has none; without a `file`, all NaN.

    Raises ColumnsError for a column that is not there or holds anything but numbers.
    """
    if not file:
        return np.full(len(test_set.images), np.nan)
    columns = read_columns(file)
    if column not in columns.values:
        raise ColumnsError(f"{file} has no column {column!r}, only {', '.join(columns.values)}")
    listed = columns.values[column]
    keys = keys_of(test_set, columns.key)
    texts = [listed.get(key, listed.get(key.rsplit("/", 1)[-1], "")) for key in keys]
    if not any(texts):
        raise ColumnsError(f"{file}: none of its {columns.key} names is in {test_set.name}, such as {keys[0]!r}")
    try:
        return np.array([float(text) if text else np.nan for text in texts])
    except ValueError as error:
        raise ColumnsError(f"{file}: column {column!r} is no quality, which is a number: {error}") from None
