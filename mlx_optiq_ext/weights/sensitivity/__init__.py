"""How much each tensor's quantization costs the whole model's output."""
