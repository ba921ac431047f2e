"""The errors a user can meet. Each message names the thing and the remedy."""


class OptiqError(Exception):
    """Something asked of this package cannot be done; the message says what to change."""


class InputError(OptiqError, ValueError):
    """A value, file or combination given by the user is not usable."""


class BudgetError(InputError):
    """No plan fits the byte budget."""


class PluginError(OptiqError):
    """A plugin failed in a hook whose answer the result depends on."""


class UnsupportedError(OptiqError):
    """The installed mlx-lm (or MLX) lacks what the feature needs."""
