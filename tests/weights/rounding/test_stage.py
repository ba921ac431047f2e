"""What several threads, or cuts into pieces, must not change."""

import mlx.core as mx
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from mlx_optiq_ext.weights import Precision, Thoroughness
from mlx_optiq_ext.weights.rounding import threads
from mlx_optiq_ext.weights.rounding.elimination import eliminated
from mlx_optiq_ext.weights.rounding.feedback import OutputSide, round_weight
from mlx_optiq_ext.weights.rounding.metric import Metric, damped
from mlx_optiq_ext.weights.rounding.selection import HOST
from mlx_optiq_ext.weights.rounding.stage import Rounding, Stage

ROUND = """
import hashlib
import mlx.core as mx
import numpy as np
from mlx_optiq_ext.weights import Precision, Thoroughness
from mlx_optiq_ext.weights.rounding.metric import Metric
from mlx_optiq_ext.weights.rounding.selection import HOST
from mlx_optiq_ext.weights.rounding.stage import Rounding, Stage

def moment(size):
    rows = np.sin(np.arange(2 * size * size, dtype=np.float32) ** 1.1).reshape(2 * size, size)
    return mx.array(np.einsum("ni,nj->ij", rows, rows))

plan = {"tall": Precision(2, 32), "wide": Precision(3, 64)}
weights = {
    "tall": mx.random.normal((5000, 64), key=mx.random.key(0)),
    "wide": mx.random.normal((128, 64), key=mx.random.key(1)),
}
stage = Stage(Rounding(plan, HOST, Thoroughness()), weights, {"wide": moment(128)})
found = stage.rounded(Metric(moment(64)))
stored = b"".join(np.array(array).tobytes() for each in found.values() for array in each)
print(hashlib.sha256(stored).hexdigest())
"""


def moment(size: int, seed: int) -> mx.array:
    rows = mx.random.normal((2 * size, size), key=mx.random.key(seed)) + 0.5
    return rows.T @ rows / size


def test_the_number_of_threads_changes_no_bit(run):
    found = [
        run("python", "-c", ROUND, env={"OPENBLAS_NUM_THREADS": count}, check=True).stdout
        for count in ("1", "3")
    ]
    assert found[0] == found[1]


def test_products_of_several_threads_factor_a_moment_as_one_does():
    whole = damped(np.array(moment(1152, 3)))
    one, several = (eliminated(whole, 64, small=small) for small in (2048, 256))
    assert np.array_equal(one.columns, several.columns)
    assert np.allclose(one.coupling, several.coupling, atol=1e-4)
    assert np.allclose(one.variances, several.variances, rtol=1e-4)


def test_blas_has_its_threads_again_after_rounding():
    def threads_of_blas():
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    before = threads_of_blas()
    with threads.single():
        assert set(threads_of_blas()) <= {1}
    assert threads_of_blas() == before


def test_a_failure_on_another_thread_is_raised():
    def failing(item):
        raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        threads.each(failing, [1, 2])
    with pytest.raises(ValueError, match="3"):
        threads.begun(failing, 3).result()


def test_the_outputs_side_is_left_out_if_that_is_wanted():
    weights, inputs = {"a": mx.random.normal((96, 64), key=mx.random.key(4))}, moment(64, 5)
    across, plan = {"a": moment(96, 6)}, {"a": Precision(2, 64)}

    def staged(**settings):
        rounding = Rounding(plan, HOST, Thoroughness(**settings))
        return Stage(rounding, weights, across).rounded(Metric(inputs))["a"]

    def straight(outputs):
        return round_weight(
            weights["a"], Metric(inputs), plan["a"], mx.float32, outputs=outputs, steps=HOST
        )

    side = OutputSide.of(np.array(across["a"]), 2)
    for found, expected in (
        (staged(outputs=False), straight(None)),
        (staged(blocks=2), straight(side)),
    ):
        assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not mx.array_equal(straight(None)[0], straight(side)[0])
