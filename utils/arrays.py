"""Operations on very long arrays that are faster, or stricter, than numpy's own."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def distinct(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """The different values of a one-dimensional array, ascending.

    `np.unique` puts them into a hash table, which takes 50 times as long as sorting where nearly all are different.
    """
    ordered = np.sort(values)
    is_new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    return ordered[is_new]


def read_whole_numbers(path: Path) -> NDArray[np.int64]:
    """The lines of a text file of whole numbers with white space between, int64 [lines, columns]; of size 0 if there
    are none. Raises ValueError, naming row and column, for anything else and for lines of unequal length.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a file without data
        warnings.simplefilter("error", DeprecationWarning)  # NumPy 2.0 takes 2.5 for 2, and only warns
        return np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None)
