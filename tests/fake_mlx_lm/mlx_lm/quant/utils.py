from pathlib import Path


def load_data(tokenizer, num_samples, sequence_length):
    return Path.home() / ".cache/mlx-lm/calibration_v5.txt"
