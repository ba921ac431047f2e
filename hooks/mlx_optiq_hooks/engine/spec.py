"""The hooks a plugin can implement.

A plugin is any module or object whose functions are marked with ``mlx_optiq_ext.hookimpl`` and
which is named in the entry-point group ``mlx_optiq_ext``. Arguments are passed by name; an
implementation lists only those it wants. Hooks marked *first result* stop at the first answer that
is not None, and installed plugins are asked before the built-in ones.

A plugin fails in a hook if it raises, calls ``sys.exit`` or returns something of another type than
the annotated one. This ends the command with exit status 2 and one line that names the plugin,
before anything is written. In the hooks of `OPTIONAL` the plugin is named on stderr, and the
command goes on as if it had returned None. ``OptiqError`` is the way to refuse: it ends the command
with that message.

``options`` has the parsed ``--optiq-*`` values of all plugins as attributes, named without the
``optiq_`` prefix; None stands for an option that was not given. Outside a command, or without any
such option, ``options`` itself is None.
"""

from collections.abc import Callable
from os import PathLike

from mlx_optiq_ext.plugins import hookspec

#: Hooks whose failure changes no result: an option or a format that is missing is refused as
#: unknown. After a failed ``optiq_sensitivity_methods`` a conversion that measures is refused,
#: because a plugin may replace a built-in method.
OPTIONAL = (
    "optiq_add_arguments",
    "optiq_sensitivity_methods",
    "optiq_kv_formats",
    "optiq_status",
)


@hookspec
def optiq_add_arguments(command, group) -> None:
    """Add options to a stock command. Called once per command, before it parses.

    ``command`` is the name after ``mlx_lm.`` (``"convert"``, ``"server"``, ...), ``group`` an
    argparse argument group. Option names must start with ``--optiq-`` and default to None. The
    parsed values never reach mlx-lm.
    """


@hookspec
def optiq_check_options(command, options, args) -> Callable | None:
    """Refuse bad input. Called after parsing, before anything is loaded, if an option was given.

    ``args`` is the stock namespace. Raise ``mlx_optiq_ext.OptiqError`` to end the command with
    exit status 2 and that message. Return a function without arguments to have it run in place of
    the command; the first one counts.
    """


@hookspec(firstresult=True)
def optiq_quant_predicate(model, config, options) -> Callable | None:
    """Choose the precision of each module. First result; called by ``quantize_model``.

    Return a callable ``(path, module) -> bool | dict``, as mlx-lm's own ``quant_predicate`` is, or
    None for mlx-lm's choice. Not called without an ``--optiq-*`` option, nor when the caller passes
    a predicate of its own.
    """


@hookspec
def optiq_sensitivity_methods() -> list | None:
    """Offer ways to measure sensitivity, as a list. All results are registered.

    Each is an object as ``mlx_optiq_ext.weights.Method`` describes it: with a ``name``, which
    becomes a choice of ``--optiq-sensitivity``, with ``needs`` and ``version``, and with
    ``measure``, which takes a ``mlx_optiq_ext.weights.Problem`` and returns its ``Sensitivity``.
    """


@hookspec(firstresult=True)
def optiq_prompt_cache(model, max_kv_size, options) -> list | None:
    """Build the list of per-layer caches. First result; None means mlx-lm's own caches.

    Called whenever mlx-lm makes a prompt cache.
    """


@hookspec
def optiq_kv_formats() -> list | None:
    """Offer ways to store keys and values, as a list of subclasses. All results, joined.

    Called once, before a KV plan or a saved prompt cache is read. Each is a subclass of
    ``mlx_optiq_ext.kv.formats.Format``, whose ``name`` and ``letters`` no other format has.
    """


@hookspec
def optiq_attention_backends() -> list | None:
    """Offer functions that attend over packed keys and values, as a list. All results, joined.

    Called once, before the first such attention. A function takes ``(queries, keys, values, scale,
    mask, sinks)`` as ``mlx_optiq_ext.kv.attend`` describes them, in the basis in which they are
    stored. It returns the output, or None for a call that it leaves to the others.
    """


@hookspec(firstresult=True)
def optiq_lora_rank(path, module, rank, options) -> int | None:
    """Choose the LoRA rank of one layer. First result; None keeps ``rank``.

    Called for each module that mlx-lm is about to adapt; ``path`` is its layer path in the model
    and ``module`` the base layer.
    """


@hookspec(firstresult=True)
def optiq_resolve_adapter(name) -> str | PathLike | None:
    """Turn an adapter's name into the folder that holds it. First result; None leaves it as given.

    Called before mlx-lm reads an adapter, with whatever the user wrote.
    """


@hookspec
def optiq_status() -> list | None:
    """Add lines to ``mlx_optiq_ext.status()``: return a list of strings."""
