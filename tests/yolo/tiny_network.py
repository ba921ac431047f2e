"""A detection network of three layers, shaped for the library as yolo-mlx's are."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_optiq_ext.yolo.images import Picture


class Block(nn.Module):
    def __init__(self, inputs, channels):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm(channels, eps=1e-3)

    def __call__(self, x):
        return nn.silu(self.bn(self.conv(x)))


class Tiny(nn.Module):
    """Rows (1, anchors, 4 + classes) for an image, as an exposed network gives them."""

    nc = 3

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(3, 48), Block(48, 48)
        self.spare = Block(3, 48)  # never called
        self.last = nn.Conv2d(48, 4 + self.nc, 1)
        self.eval()

    def __call__(self, x):
        y = self.last(self.second(self.first(x))).reshape(1, -1, 4 + self.nc)
        boxes = mx.concatenate([y[..., :2] * 8, 20 + 4 * y[..., 2:4]], axis=-1)
        return mx.concatenate([boxes, mx.sigmoid(y[..., 4:] - 2)], axis=-1)


def pictures(count: int, size: int = 16) -> list[Picture]:
    shape = (1, size, size, 3)
    keys = [mx.random.key(index) for index in range(count)]
    pixels = [mx.random.uniform(shape=shape, key=key) for key in keys]
    return [Picture(Path(), each, (size, size), 1, 0, 0) for each in pixels]
