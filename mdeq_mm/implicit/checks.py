"""Checks of arguments, whose messages name field, value and remedy."""

import math
import numbers


def check_int(field, value, least):
    """Refuse a value that is no integer or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f'{field} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{field}={value} is too small: use {least} or more')


def check_flag(field, value):
    """Refuse a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f'{field} must be True or False, got {value!r}')


def is_number(value):
    """Whether a value is a real number, which truth values are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_share(field, value):
    """Refuse a value outside (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f'{field}={value!r} is out of range: use 0 < {field} <= 1')


def check_amount(field, value):
    """Refuse a value that is no finite number of 0 or more."""
    if not is_number(value):
        raise TypeError(f'{field} must be a number, got {value!r}')
    if not 0 <= value < math.inf:
        raise ValueError(f'{field}={value} is out of range: use a number of 0 or more')
