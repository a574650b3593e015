"""Errors that a user can fix; their text says what is wrong, where, and how to fix it."""


class LoraGANError(ValueError):
    """A mistake in settings or data; the command line prints its text without a traceback."""


class DataError(LoraGANError):
    """A data file that cannot be read, or a row that cannot be used."""


class RewardError(LoraGANError):
    """A reward that returned something other than one finite number for each completion."""


class NonFiniteError(LoraGANError):
    """A loss or gradient that is NaN or infinite; training stops before it reaches the weights."""
