"""``mlx_lm.utils``: text models, the predicate that quantizes by plan, adapter configs."""

import sys

from ..commands import convert, lora
from ..engine import session
from ..engine.patch import Patch, bind, of


def load(wrapped, instance, args, kwargs):
    run = session.state(convert.Run)
    if run is None or not run.options.text_only:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import modalities

    call = bind(wrapped, args, kwargs)
    return_config = call.pop("return_config", False)
    loaded = modalities.load_text(wrapped, **call)
    run.stripped = loaded.report
    return loaded[:3] if return_config else loaded[:2]


def sharded_load(wrapped, instance, args, kwargs):
    loaded, running = wrapped(*args, **kwargs), session.running()
    if running is not None and running.options is None:
        return loaded
    from mlx_optiq_ext.adapters import Split, note_split
    from mlx_optiq_ext.model.hub import find_folder

    call, utils = bind(wrapped, args, kwargs), sys.modules[wrapped.__module__]
    options = {k: v for k, v in call.items() if k == "trust_remote_code"}
    model = loaded[0]

    def whole():
        folder = find_folder(call["repo"], ["*.json"])
        return utils.load_model(folder, lazy=True, strict=False, **options)[0]

    # mlx-lm splits by heads unless a group is given.
    group = call.get("tensor_group")
    if group is None and call.get("pipeline_group") is None and hasattr(model, "shard"):
        group = utils.mx.distributed.init()
    split = None if group is None else lambda other: other.shard(group)
    note_split(model, Split(whole, split))
    return loaded


def quantize_model(wrapped, instance, args, kwargs):
    running = session.current()
    if running is None:
        return wrapped(*args, **kwargs)
    from ..installation import plugin_manager

    call, run = bind(wrapped, args, kwargs), session.state(convert.Run)
    if run is not None and run.conversion is not None:
        from mlx_optiq_ext.weights import ready

        call["config"] = ready(call["model"], call["config"], run.conversion.dtype)
    if call.get("quant_predicate") is None:
        predicate = plugin_manager().hook.optiq_quant_predicate(
            model=call["model"], config=call["config"], options=running.options
        )
        if predicate is not None:
            call["quant_predicate"] = predicate
    result = wrapped(**call)
    if run is not None and run.conversion is not None and run.conversion.refined:
        from mlx_optiq_ext.weights import put

        model, _ = result
        put(model, run.conversion.refined, run.conversion.parameters)
    return result


def make_shards(wrapped, instance, args, kwargs):
    run = session.state(convert.Run)
    conversion = None if run is None else run.conversion
    if conversion is None or conversion.block_bytes is None:
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext.weights import shards

    weights = bind(wrapped, args, kwargs)["weights"]
    return shards.by_source(weights, conversion.plan.precisions, conversion.block_bytes)


def save_config(wrapped, instance, args, kwargs):
    run, given = session.state(lora.Run), bind(wrapped, args, kwargs)["config"]
    if run is None or run.request is None or run.checkpoint is None:
        asked = run is not None and run.request is not None and run.options.training
        if asked or lora.keys_of_file(given):
            from mlx_optiq_ext.errors import UnsupportedError

            raise UnsupportedError(
                "mlx_lm.lora no longer calls what gives each layer its rank: it was reloaded, or "
                "another tool put its own in its place: start anew without that"
            )
        return wrapped(*args, **kwargs)
    from mlx_optiq_ext import distributed

    if not distributed.leads():
        return None  # stock writes it in every process
    resumed = run.request.resume
    return run.checkpoint.write_config(
        {**given, "resume_adapter_file": None if resumed is None else str(resumed)}
    )


#: Attributes that say which layers of a split model a process runs.
PIPELINE = ("pipeline_rank", "pipeline_size", "start_idx", "end_idx")

PATCHES = (
    Patch(
        "mlx_lm.utils:load",
        feature="modalities",
        why="hands the convert command the text model of a multimodal checkpoint",
        upstream="none: mlx-lm keeps the wrapper and its config keys",
        wrapper=load,
        uses=(
            *of("mlx_lm.models.base", "BaseModelArgs.from_dict"),
            *of("mlx_lm.utils", "MODEL_REMAPPING"),
        ),
    ),
    Patch(
        "mlx_lm.utils:sharded_load",
        feature="sharded",
        why="notes how a model was split, so that adapters are split alike",
        upstream="none: adapters are refused in several processes (server.py)",
        wrapper=sharded_load,
        uses=(
            *of("mlx_lm.models.pipeline", *(f"PipelineMixin.{name}" for name in PIPELINE)),
            *of("mlx_lm.utils", "load_model", "mx"),
        ),
    ),
    Patch(
        "mlx_lm.utils:quantize_model",
        feature="weights",
        why="hands the plan over as quant_predicate, by name",
        upstream="none: no stock command takes a predicate by flag",
        wrapper=quantize_model,
    ),
    Patch(
        "mlx_lm.utils:make_shards",
        feature="weights",
        why="keeps shards of a model larger than memory as small as one of its layers",
        upstream="none: stock evaluates up to 5 GB at once when it writes",
        wrapper=make_shards,
        uses=of("mlx_lm.utils", "save_model"),
    ),
    Patch(
        "mlx_lm.utils:save_config",
        feature="lora",
        why="adds PEFT's keys to a trained adapter's config, written whole",
        upstream="none: mlx-lm knows its own keys only",
        wrapper=save_config,
    ),
)
