"""Which commands accept our options when ``mlx.launch`` started several processes."""

from mlx_optiq_ext.errors import UnsupportedError

#: Commands whose model mlx-lm splits over the processes.
SPLIT = ("benchmark", "chat", "server")
#: Commands that would run the whole model in each process.
WHOLE = ("cache_prompt", "generate", "perplexity")


def check(command: str) -> None:
    """Refuse a command that several processes cannot share.

    Raises:
        UnsupportedError: Each process would do all of the work, or mlx-lm cannot split the model.
    """
    from mlx_optiq_ext import distributed

    from ..installation import gate

    if command not in SPLIT + WHOLE or distributed.size() == 1:
        return
    if command in WHOLE:
        raise UnsupportedError(
            f"mlx_lm.{command} does not split a model: each of the {distributed.size()} processes "
            "would run all of it: use mlx_lm.chat, mlx_lm.server, mlx_lm.benchmark or one process"
        )
    gate().require("sharded")
