import argparse


def main():
    parser = argparse.ArgumentParser(description="Stand-in for mlx_lm.server")
    parser.add_argument("--port", type=int, default=8080)
    print(vars(parser.parse_args()))
