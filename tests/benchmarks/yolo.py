"""YOLO26 by plan beside uniform affine packing at the same bytes on disk.

    python tests/benchmarks/yolo.py --model yolo26n.safetensors --images photos --bits 3,4,5

Every other image calibrates, the rest is measured on. Uniform packs every convolution of the
inference path at one width (group size 64, 32 where 64 does not divide, half precision where
neither does) and keeps the rest in half precision; its training branches are left out, as ours
are. Each line: bytes of both files, detection error (KL of the classes in nats, confidence-weighted
1 - IoU of the boxes), mean average precision against the original's own detections, and bytes of
weights that stay in memory.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_optiq_ext import yolo
from mlx_optiq_ext.yolo import images, network
from mlx_optiq_ext.yolo.reading.checkpoint import read


def uniform(source: Path, bits: int, folder: Path) -> tuple[int, Path]:
    """Bytes of a uniformly packed file, and a checkpoint of what it holds."""
    checkpoint = read(source)
    model = network.load(checkpoint)
    plain = network.parameters(model)
    layers = {f"{layer.path}.weight" for layer in network.layers(model)}
    packed, restored = {}, dict(plain)
    for name, array in plain.items():
        if name.endswith("stride"):
            continue
        width = array.size // array.shape[0] if array.ndim > 1 else 1
        group = next((g for g in (64, 32) if width % g == 0), None)
        if name in layers and group:
            rows = array.reshape(array.shape[0], -1).astype(mx.float16)
            parts = mx.quantize(rows, group_size=group, bits=bits)
            values = mx.dequantize(*parts, group_size=group, bits=bits)
            restored[name] = values.reshape(array.shape).astype(mx.float32)
            parts = dict(zip(("weight", "scales", "biases"), parts, strict=True))
        else:
            parts = {"": array.astype(mx.float16)}
            restored[name] = parts[""].astype(mx.float32)
        if "23.cv2." not in name and "23.cv3." not in name:
            packed |= {f"{name}.{part}": value for part, value in parts.items()}
    mx.save_safetensors(str(folder / "packed.safetensors"), packed)
    mx.save_safetensors(str(folder / "yolo26.safetensors"), restored)
    return (folder / "packed.safetensors").stat().st_size, folder / "yolo26.safetensors"


def resident(path: Path) -> int:
    """Bytes of the weights of a loaded checkpoint."""
    return sum(a.nbytes for a in network.parameters(yolo.load(path).model).values())


def show(title: str, size: int, found: yolo.Evaluation, held: int) -> None:
    error = found.error
    print(
        f"{title:<10} {size:>10,} bytes  classes {error.classes:.4g}  boxes {error.boxes:.4g}  "
        f"total {error.total:.4g}  mAP50-95 {found.agreement.map50_95:.3f}  mAP50 "
        f"{found.agreement.map50:.3f}  {held:>11,} bytes held  {found.seconds * 1e3:.0f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--bits", default="3,4,5")
    parser.add_argument("--image-size", type=int, default=640)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, path in enumerate(images.find(args.images)):
            part = folder / ("calibration" if index % 2 else "test")
            part.mkdir(exist_ok=True)
            shutil.copy(path, part)
        parameters = sum(a.size for a in read(args.model).weights.values())
        for bits in map(int, args.bits.split(",")):
            size, restored = uniform(args.model, bits, folder)
            result = yolo.run_yolo_pipeline(
                args.model,
                folder / f"plan{bits}",
                calibration=folder / "calibration",
                budget=size * 8 / parameters,
                image_size=args.image_size,
            )
            test, side = folder / "test", args.image_size
            flat = yolo.evaluate(restored, args.model, test, image_size=side)
            ours = yolo.evaluate(result.path, args.model, test, image_size=side)
            print(f"budget {size * 8 / parameters:.3f} bits per weight, {ours.images} images")
            show(f"uniform {bits}", size, flat, resident(restored))
            show("plan", result.plan.file_bytes, ours, resident(result.path))
            print(f"error ratio {ours.error.total / flat.error.total:.3f}", flush=True)


if __name__ == "__main__":
    main()
