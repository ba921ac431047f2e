"""How detections are judged, with yolo-mlx and beside pycocotools."""

import importlib
import json

import numpy as np
import pytest

from mlx_optiq_ext import yolo
from mlx_optiq_ext.errors import InputError

from .conftest import SIZE

pytestmark = pytest.mark.yolo


def test_evaluation_against_the_original_and_against_labels(
    converted, checkpoint, photos, tmp_path
):
    same = yolo.evaluate(checkpoint, checkpoint, photos, image_size=SIZE)
    assert same.error.total == pytest.approx(0, abs=0.02)
    assert same.images == 5
    assert same.agreement.map50_95 == 1
    found = yolo.evaluate(converted[7].path.parent, checkpoint, photos, image_size=SIZE)
    assert found.error.total > 0
    assert found.agreement.map50_95 < 1
    assert found.seconds > 0
    rows = yolo.detect(checkpoint, photos / "0.png", SIZE)[:3]
    labels = tmp_path / "labels.json"
    boxes = [[left, top, right - left, bottom - top] for left, top, right, bottom in rows[:, :4]]
    labels.write_text(
        json.dumps(
            {
                "images": [{"id": 0, "file_name": "0.png"}],
                "categories": [{"id": i} for i in range(80)],
                "annotations": [
                    {"image_id": 0, "category_id": int(row[5]), "bbox": box}
                    for row, box in zip(rows, boxes, strict=True)
                ],
            }
        )
    )
    scored = yolo.evaluate(checkpoint, checkpoint, photos, labels=labels, image_size=SIZE)
    assert scored.labelled == scored.labelled_original
    assert scored.labelled is not None
    assert scored.labelled.map50 > 0.5
    assert any("1.png has no labels" in line for line in scored.skipped)


def test_the_picture_shows_both(converted, checkpoint, photos, tmp_path):
    Image = importlib.import_module("PIL.Image")
    target = tmp_path / "both.png"
    yolo.draw(
        photos / "1.png", checkpoint, converted[5].path.parent, target, least=0.05, image_size=SIZE
    )
    with Image.open(target) as sheet, Image.open(photos / "1.png") as plain:
        assert sheet.size == (2 * plain.width + 8, plain.height)
        left = np.array(sheet.convert("RGB"))[:, : plain.width].astype(int)
        assert np.abs(left - np.array(plain.convert("RGB"))).max() > 50  # boxes are drawn
    with pytest.raises(InputError, match=r"neither in \.png"):
        yolo.draw(photos / "1.png", checkpoint, checkpoint, tmp_path / "a.txt")


def test_precision_is_pycocotools(tmp_path):
    """Random scenes with crowds and near misses: the same numbers as COCO's own program."""
    COCO = importlib.import_module("pycocotools.coco").COCO
    COCOeval = importlib.import_module("pycocotools.cocoeval").COCOeval
    from mlx_optiq_ext.yolo.detection.average_precision import mean_precision

    draw = np.random.default_rng(6)
    data = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(3)]}
    results, found, identity = [], [], 0
    for image in range(12):
        data["images"].append({"id": image, "file_name": f"{image}.jpg"})
        rows = []
        for _ in range(draw.integers(0, 7)):
            x, y, w, h = (*draw.uniform(0, 80, 2), *draw.uniform(5, 60, 2))
            category, crowd = int(draw.integers(3)), int(draw.random() < 0.15)
            identity += 1
            data["annotations"].append(
                {"id": identity, "image_id": image, "category_id": category, "iscrowd": crowd,
                 "bbox": [x, y, w, h], "area": w * h}
            )  # fmt: skip
            for _ in range(draw.integers(0, 4)):
                dx, dy, dw, dh = draw.normal(0, 4, 4)
                box = [x + dx, y + dy, max(w + dw, 1), max(h + dh, 1)]
                score = float(draw.choice([0.3, 0.5, draw.random()]))
                label = category if draw.random() < 0.9 else int(draw.integers(3))
                results.append(
                    {"image_id": image, "category_id": label, "bbox": box, "score": score}
                )
                rows.append([box[0], box[1], box[0] + box[2], box[1] + box[3], score, label])
        found.append(np.array(rows).reshape(-1, 6))
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(data))
    coco = COCO(str(path))
    theirs = COCOeval(coco, coco.loadRes(results), "bbox")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    labels = yolo.read_labels(path, 3)
    ours = mean_precision([labels[f"{i}.jpg"] for i in range(12)], found)
    assert 0.1 < ours.map50_95 < 0.9
    assert ours.map50_95 == pytest.approx(theirs.stats[0], abs=1e-9)
    assert ours.map50 == pytest.approx(theirs.stats[1], abs=1e-9)


@pytest.mark.shared
def test_the_real_yolo26n_finds_what_it_found(shared, tmp_path):
    """At 5 bits per weight, half of the images unseen, at 320 pixels."""
    images = sorted((shared / "data" / "images").glob("*.jpg"))
    for index, path in enumerate(images):
        part = tmp_path / ("calibration" if index % 2 else "test")
        part.mkdir(exist_ok=True)
        (part / path.name).write_bytes(path.read_bytes())
    source = shared / "data" / "yolo" / "yolo26n.safetensors"
    result = yolo.run_yolo_pipeline(
        source, tmp_path / "out", calibration=tmp_path / "calibration", budget=5, image_size=320
    )
    found = yolo.evaluate(result.path, source, tmp_path / "test", image_size=320)
    assert result.plan.bits_per_weight <= 5
    assert found.agreement.map50 > 0.85
