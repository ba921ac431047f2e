import mlx_lm
import pytest
from toy_fixtures import quiet

from mlx_optiq_ext.weights import search, study_model
from mlx_optiq_ext.weights.report import Evidence, gather


@pytest.fixture(scope="package")
def study(tmp_path_factory, toy):
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text("There are 12 apples in each box. How many are there in 7? " * 80)
    model, tokenizer = mlx_lm.load(str(toy))[:2]
    return study_model(model, tokenizer, quiet(calibration=text))


@pytest.fixture(scope="package")
def evidence(study) -> Evidence:
    return gather(study, search(study, 4.0), "toy")
