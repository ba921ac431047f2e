def linear_to_lora_layers(model, num_layers, config, use_dora=False):
    return None


def load_adapters(model, adapter_path):
    return adapter_path
