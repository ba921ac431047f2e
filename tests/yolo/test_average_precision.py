import json

import numpy as np
import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.yolo.detection.average_precision import Objects, mean_precision
from mlx_optiq_ext.yolo.detection.labels import read_labels


def objects(boxes, classes, crowd=None):
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    return Objects(np.array(boxes, float).reshape(-1, 4), np.array(classes, int), crowd)


BOX = (0, 0, 10, 10)
FAR = (50, 50, 60, 60)


def rows(*found):
    return np.array(found, float).reshape(-1, 6)


def test_perfect_detections_score_one():
    truth = [objects([BOX, FAR], [0, 1]), objects([], [])]
    found = [rows((*BOX, 0.9, 0), (*FAR, 0.8, 1)), rows()]
    assert mean_precision(truth, found).map50_95 == 1


def test_a_half_found_class_scores_the_recalls_up_to_a_half():
    truth = [objects([BOX, FAR], [0, 0])]
    assert mean_precision(truth, [rows((*BOX, 0.9, 0))]).map50 == pytest.approx(51 / 101)


def test_a_false_detection_ahead_halves_the_precision():
    truth = [objects([BOX], [0])]
    found = [rows((*FAR, 0.9, 0), (*BOX, 0.8, 0))]
    assert mean_precision(truth, found).map50 == pytest.approx(0.5)
    behind = [rows((*FAR, 0.7, 0), (*BOX, 0.8, 0))]
    assert mean_precision(truth, behind).map50 == 1


def test_a_second_detection_of_one_object_is_wrong():
    truth = [objects([BOX, FAR], [0, 0])]
    found = [rows((*BOX, 0.9, 0), (*BOX, 0.8, 0), (*FAR, 0.7, 0))]
    expected = (51 + 50 * 2 / 3) / 101
    assert mean_precision(truth, found).map50 == pytest.approx(expected)


def test_thresholds_count_one_by_one():
    truth = [objects([BOX], [0])]
    found = [rows((0, 0, 10, 7.2, 0.9, 0))]  # an IoU of 0.72
    assert mean_precision(truth, found).map50_95 == pytest.approx(0.5)


def test_a_crowd_takes_any_number_and_counts_for_nothing():
    truth = [objects([BOX, (40, 40, 90, 90)], [0, 0], [False, True])]
    found = [rows((*FAR, 0.95, 0), (*FAR, 0.94, 0), (*BOX, 0.9, 0))]
    assert mean_precision(truth, found).map50_95 == 1


def test_classes_without_objects_do_not_count():
    truth = [objects([BOX], [3])]
    found = [rows((*BOX, 0.9, 3), (*FAR, 0.9, 5))]
    assert mean_precision(truth, found).map50_95 == 1
    assert np.isnan(mean_precision([objects([], [])], [rows()]).map50_95)


def test_sure_detections_become_the_truth():
    found = rows((*BOX, 0.9, 2), (*FAR, 0.1, 1))
    truth = Objects.of(found, 0.25)
    assert truth.classes.tolist() == [2]
    assert truth.boxes.tolist() == [list(BOX)]


LABELS = {
    "images": [{"id": 7, "file_name": "a/b.jpg"}, {"id": 8, "file_name": "c.jpg"}],
    "categories": [{"id": 90, "name": "z"}, {"id": 3, "name": "y"}],
    "annotations": [
        {"image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
    ],
}


def test_coco_labels_are_read_in_the_order_of_their_ids(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(LABELS))
    found = read_labels(path, 2)
    assert found.keys() == {"b.jpg", "c.jpg"}
    assert found["b.jpg"].boxes.tolist() == [[1, 2, 4, 6], [0, 0, 5, 5]]
    assert found["b.jpg"].classes.tolist() == [1, 0]
    assert found["b.jpg"].crowd.tolist() == [False, True]
    assert found["c.jpg"].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "KeyError"),
        ({"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0]}]}, "ValueError"),
        ({"categories": None}, "TypeError"),
        ({"categories": LABELS["categories"][:1], "annotations": []}, "1 categories, the network"),
    ],
)
def test_other_labels_are_refused(tmp_path, change, message):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({**LABELS, **change}))
    with pytest.raises(InputError, match=message):
        read_labels(path, 2)
