"""The weights table: its rows, the comparison with rivals, and how rivals are run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import compute_bits_per_weight
from rivals import comparison, ggml, methods, mlx_lm_quant, mlx_optiq, recipes, rows
from rivals.process import Cost

COST = Cost(seconds=2.0, processor=1.0, resident_gib=0.5, mlx_gib=0.25, others=0.0)


def row(label: str, **values):
    known = {"model": "m", "tokens": 4096, "method": label.split()[0], "label": label}
    known |= {"budget": 4.0, "bpw": 4.0, "bytes": 5_000_000, "kl": {"books": 0.1}}
    return {**known, "cost": vars(COST), "contended": False, **values}


def setting(tmp_path: Path, budget: float) -> methods.Setting:
    given = (tmp_path / name for name in ("model", "text.txt", "windows.npz", "work"))
    others = {"mlx_optiq": tmp_path / "venv", "ggml": tmp_path / "libggml-base.so"}
    return methods.Setting(*given, budget=budget, **others)


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert rows.read(path) == []
    rows.append(path, row("stock"))
    with path.open("a") as stream:
        stream.write('{"budget": 4.0, "la')
    rows.append(path, row("plan"))
    assert [r["label"] for r in rows.read(path)] == ["stock", "plan"]


def test_the_table_compares_with_stock_and_the_best_rival_at_the_same_bytes():
    failed = {**vars(COST), "failure": "AssertionError: Unsupported bits 3"}
    printed = comparison.table(
        [
            {"note": "a line that is no row"},
            row("stock 3g32", budget=None, kl={"books": 0.4, "python": 0.8}),
            row("plan", kl={"books": 0.9}),
            row("plan", kl={"books": 0.2}),
            row("refine", kl={"books": 0.1}),
            row("refine", budget=3.5, bpw=3.5, kl={"books": 0.7}),
            row("dwq 3g32 1e-05", budget=None, kl={"books": 0.3}),
            row("dwq 3g32 5e-05", budget=None, kl={"books": 0.25}),
            row("distill", kl={}, cost=failed),
            row("A", method="ggml", budget=None, bpw=3.9, kl={"books": 0.32}),
            row("B", method="ggml", budget=None, bpw=4.1, kl={"books": 0.02}),
            row("stock 3g32", model="other", budget=None, kl={"books": 0.5}),
        ],
        ["books"],
    ).splitlines()
    assert printed[0] == "m, 4,096 tokens of each kind:"
    assert printed[4] == (
        "| 4 | books | 0.400 | 0.200 (0.50) | 0.100 (0.25) |  | 0.250 (0.62) | 0.080 (0.20) "
        "| 1.25 |  |"
    )
    # A KL at 3.5 is compared with nothing: no rival lies on both sides.
    assert printed[5] == "| 3.5 | books |  |  | 0.700 |  |  |  |  |  |"
    assert "other, 4,096 tokens of each kind:" in printed
    assert len({line.count("|") for line in printed[2:6]}) == 1


def test_a_row_says_size_time_and_what_failed():
    fine = rows.line(row("plan", contended=True))
    assert fine == ("| 4 | plan | 4.0000 | 5,000,000 | books 0.1000 | 2* | 0.50 GiB | 0.25 GiB |")
    failed = rows.line(row("gptq", kl={}, cost={**vars(COST), "failure": "no 3 bits"}))
    assert failed.count("|") == fine.count("|")
    assert "no 3 bits" in failed


def test_a_size_between_two_files_lies_on_the_best_line():
    points = [(4.0, 0.4), (5.0, 0.1), (4.2, 0.9), (6.0, 0.09)]
    assert comparison.at(points, 4.5) == pytest.approx(0.2)
    assert comparison.at(points, 4.01) == 0.4
    assert comparison.at(points, 3.5) is None
    assert comparison.at([], 4.0) is None


def test_stock_is_what_its_file_of_a_size_has():
    points = [(4.0, 0.4), (5.0, 0.1), (4.2, 0.9), (6.0, 0.09)]
    assert comparison.of_size(points, 4.2) == 0.9
    assert comparison.of_size(points, 4.5) == pytest.approx(0.2)
    assert comparison.of_size([], 4.0) is None


def test_stock_is_converted_next_to_a_budget_that_it_cannot_meet(tmp_path):
    assert setting(tmp_path, 4.5).around == [(4, 64)]
    assert setting(tmp_path, 4.2).around == [(3, 32), (4, 64)]
    assert setting(tmp_path, 4.2).uniform == (3, 32)


def test_recipes_name_a_type_for_every_tensor():
    kinds = {
        (path, layer, wide): recipes.kind("Q3_K_M", f"model.layers.0.{path}", layer, 30, wide)
        for path in ("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
        for layer in (0, 1, 29)
        for wide in (False, True)
    }
    assert kinds["self_attn.v_proj", 1, False] == "Q5_K"
    assert kinds["self_attn.v_proj", 29, False] == "Q4_K"
    assert kinds["mlp.down_proj", 0, True] == "Q5_K"
    assert kinds["mlp.down_proj", 1, True] == "Q4_K"
    assert kinds["mlp.up_proj", 0, False] == "Q3_K"
    assert recipes.kind("IQ4_XS", "v_proj", 3, 30, True) == "Q5_K"
    assert [recipes.kind("Q4_K_M", "v_proj", layer, 16, False) for layer in range(6)] == [
        *("Q6_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K")
    ]
    assert recipes.parsed("IQ2_M/IQ4_XS+") == ("IQ2_M", "IQ4_XS", True)
    assert recipes.parsed("IQ2_M") == ("IQ2_M", "Q5_K", False)
    with pytest.raises(SystemExit, match="no recipe"):
        recipes.parsed("Q9")
    for names in recipes.NEAR.values():
        assert all(recipes.parsed(name)[1] in ggml.TYPES for name in names)


def test_the_importance_matrix_is_the_mean_square_of_what_layers_see(tiny):
    model: Any = mlx_lm.load(str(tiny))[0]
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    tokens = np.arange(1024, dtype=np.int32) % 64
    before = dict(model.named_modules()).keys()
    found = ggml.importance_matrix(model, tokens)
    assert dict(model.named_modules()).keys() == before
    windows = mx.array(tokens.reshape(2, 512))
    inputs = model.layers[0].input_layernorm(model.model.embed_tokens(windows))
    expected = inputs.square().mean(axis=(0, 1))
    name = "model.layers.0.self_attn.q_proj"
    assert np.allclose(found[name], expected, rtol=1e-4)
    head = model.model(windows).square().mean(axis=(0, 1))
    assert np.allclose(found["head"], head, rtol=1e-4)


def test_dwq_trains_on_pieces_that_its_validation_does_not_hold():
    train, valid = mlx_lm_quant.pieces(np.arange(10_000), 512, 40)
    assert (len(train), len(valid)) == (40, 32)
    assert all(len(piece) == 512 for piece, _ in train + valid)
    assert max(piece[-1] for piece, _ in train) < min(piece[0] for piece, _ in valid)


def test_every_method_writes_where_it_says_and_only_ours_has_flags_of_ours(tmp_path):
    known = methods.known_flags()
    for budget in methods.BUDGETS:
        for name, method in methods.METHODS.items():
            runs = list(method(setting(tmp_path, budget)))
            assert runs
            assert len({run.label for run in runs}) == len(runs)
            for run in runs:
                assert str(run.out) in run.command
                ours = any(word.startswith("--optiq") for word in run.command)
                assert ours == (run.environment.keys() == {"MLX_OPTIQ_EXT_CACHE"})
            if name in ("plan", "refine", "distill"):
                assert methods.missing_flag(runs[0], known) is None
    assert methods.missing_flag(runs[0], known) is None
    strange = methods.Run("x", ("--optiq-budget", "4", "--optiq-unheard-of"), tmp_path)
    assert methods.missing_flag(strange, known) == "--optiq-unheard-of"
    bare = replace(setting(tmp_path, 4.0), mlx_optiq=None, ggml=None)
    assert list(methods.mlx_optiq(bare)) == list(methods.ggml(bare)) == []


@pytest.mark.parametrize("budget", methods.BUDGETS)
def test_bytes_of_a_uniform_packing_are_what_mlx_lm_counts(tiny, budget):
    bits, group = methods.UNIFORM[budget]
    model = mlx_lm.load(str(tiny), lazy=True)[0]
    predicted = mlx_optiq.stored_bits(model, lambda *_: {"bits": bits, "group_size": group})
    parameters: Any = tree_flatten(model.parameters())
    elements = sum(p.size for _, p in parameters)
    nn.quantize(model, group_size=group, bits=bits)
    assert predicted / elements == pytest.approx(compute_bits_per_weight(model))
