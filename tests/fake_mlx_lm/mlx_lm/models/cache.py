def make_prompt_cache(model, max_kv_size=None):
    return ["stock"]
