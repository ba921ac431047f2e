import argparse


def train_model(args, model, train_set, valid_set, training_callback=None):
    return None


def run(args, training_callback=None):
    return args


def main():
    run(argparse.ArgumentParser().parse_args())
