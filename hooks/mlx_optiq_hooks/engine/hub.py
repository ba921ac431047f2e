"""Turns errors of the Hugging Face Hub into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_optiq_ext.errors import InputError

from . import session


@contextmanager
def named() -> Iterator[None]:
    """Turn an error of the Hub into ours, if the running command has options of ours.

    Raises:
        InputError: The Hub raised an error.
    """
    try:
        yield
    except Exception as error:
        if session.current() is None or not type(error).__module__.startswith("huggingface_hub"):
            raise
        what = str(error).partition("\n")[0].partition(". ")[0].strip() or type(error).__name__
        raise InputError(
            f"a model or adapter is neither a folder here nor could it be read from the Hub "
            f"({type(error).__name__}: {what}): check its name and the connection"
        ) from error
