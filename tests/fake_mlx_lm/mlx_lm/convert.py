import argparse

from .utils import quantize_model


def convert(
    hf_path,
    mlx_path="mlx_model",
    quantize=False,
    q_group_size=None,
    q_bits=None,
    q_mode="affine",
    dtype=None,
    upload_repo=None,
    revision=None,
    dequantize=False,
    quant_predicate=None,
    trust_remote_code=False,
):
    print(quantize_model(hf_path, {}, q_group_size, q_bits, mode=q_mode))


def configure_parser():
    parser = argparse.ArgumentParser(description="Stand-in for mlx_lm.convert")
    parser.add_argument("--hf-path", "--model")
    parser.add_argument("--mlx-path", default="mlx_model")
    parser.add_argument("-q", "--quantize", action="store_true")
    parser.add_argument("--q-group-size", type=int)
    parser.add_argument("--q-bits", type=int)
    parser.add_argument("--q-mode", default="affine")
    parser.add_argument("--quant-predicate")
    parser.add_argument("-d", "--dequantize", action="store_true")
    return parser


def main():
    args = configure_parser().parse_args()
    convert(**vars(args))


if __name__ == "__main__":
    main()
