"""The errors a user can meet. Each message names the thing and the remedy."""


class OptiqError(Exception):
    """Something asked of this package cannot be done; the message says what to change."""


class InputError(OptiqError, ValueError):
    """A value, file or combination given by the user is not usable."""


class BudgetError(InputError):
    """No plan fits the byte budget."""


class UnsupportedError(OptiqError):
    """The installed mlx-lm (or MLX) lacks what the feature needs."""
