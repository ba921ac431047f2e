MAX_FILE_SIZE_GB = 5


def quantize_model(
    model, config, group_size, bits, mode="affine", global_scale=False, quant_predicate=None
):
    return {"model": model, "bits": bits, "quant_predicate": quant_predicate}


def make_shards(weights, max_file_size_gb=MAX_FILE_SIZE_GB):
    return [weights]


def save_config(config, config_path, *, keep_vision_config=False):
    return config_path


def save_model(save_path, model, *, donate_model=False):
    return make_shards(model)


def hf_repo_to_path(hf_repo):
    return hf_repo


def upload_to_hub(path, upload_repo):
    raise AssertionError("nothing is uploaded")
