"""Signatures are read from source, recorded for every row, and compared by name."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from mlx_optiq_compat import installed_version, matching, signature, source
from mlx_optiq_compat.matrix import rows, supported
from mlx_optiq_compat.version import package_folder

ROOT = Path(__file__).resolve().parents[2]

TARGETS = [
    "mlx_lm.convert:argparse",
    "mlx_lm.convert:convert",
    "mlx_lm.utils:quantize_model",
    "mlx_lm.server:APIHandler.do_POST",
    "mlx_lm.models.cache:make_prompt_cache",
]

SOURCES = {
    "_version.py": "__version__ = '0.33.0.dev1'\n",
    "convert.py": (
        "import argparse\n"
        "def convert(hf_path: str, mlx_path: str = 'mlx_model', quantize: bool = False,\n"
        "            q_group_size: int = None, q_bits: int = None, q_mode: str = 'affine',\n"
        "            dtype=None, upload_repo=None, revision=None, dequantize=False,\n"
        "            quant_predicate=None, trust_remote_code=False) -> None: ...\n"
    ),
    "utils.py": (
        "def quantize_model(model, config, group_size, bits, mode: str = 'affine',\n"
        "                   global_scale=False, quant_predicate=None): ...\n"
    ),
    "server.py": "class APIHandler(BaseHTTPRequestHandler):\n    def do_POST(self): ...\n",
    "models/cache.py": "def make_prompt_cache(model, max_kv_size=None): ...\n",
}


@pytest.fixture
def fake_mlx_lm(tmp_path, monkeypatch):
    """A folder that `import mlx_lm` finds first; it raises when anything imports it."""
    folder = tmp_path / "mlx_lm"
    (folder / "models").mkdir(parents=True)
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    for name in ("__init__.py", "models/__init__.py"):
        (folder / name).write_text("raise RuntimeError('imported')\n")
    for name in [each for each in sys.modules if each.partition(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_an_untested_release_with_recorded_signatures_matches(fake_mlx_lm):
    assert installed_version() == "0.33.0.dev1"
    assert matching(TARGETS) == []


def test_a_changed_signature_is_named_with_both_forms(fake_mlx_lm):
    (fake_mlx_lm / "utils.py").write_text(
        "def quantize_model(model, config, plan, *, quant_predicate=None): ...\n"
    )
    (complaint,) = matching(TARGETS)
    assert complaint == (
        "mlx_lm.utils:quantize_model has changed: it is (model, config, plan, *, "
        "quant_predicate=None), but was (model, config, group_size, bits, mode='affine', "
        "global_scale=False, quant_predicate=None) in mlx-lm 0.32.1.."
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_kv_size=None", "max_kv_size=0"),
        ("max_kv_size=None", "*, max_kv_size=None"),
        ("max_kv_size=None", "max_kv_size"),
        ("model, ", "model, /, "),
        ("max_kv_size=None", "max_kv_size=None, **kwargs"),
        ("def ", "async def "),
    ],
)
def test_names_kinds_and_defaults_count(fake_mlx_lm, old, new):
    path = fake_mlx_lm / "models" / "cache.py"
    path.write_text(path.read_text().replace(old, new))
    (complaint,) = matching(TARGETS)
    assert complaint.startswith("mlx_lm.models.cache:make_prompt_cache has changed: it is ")


def test_annotations_decorators_and_bodies_do_not_count(fake_mlx_lm):
    (fake_mlx_lm / "models" / "cache.py").write_text(
        "if True:\n"
        "    @lru_cache\n"
        "    def make_prompt_cache(model: 'Module', max_kv_size: int | None = None) -> list:\n"
        "        return []\n"
    )
    assert matching(TARGETS) == []


def test_missing_targets_are_named(fake_mlx_lm):
    (fake_mlx_lm / "convert.py").write_text("from argparse import ArgumentParser\n")
    (fake_mlx_lm / "server.py").unlink()  # the others still match
    complaints = matching(TARGETS)
    assert [each.partition(":")[0] for each in complaints] == [
        "mlx_lm.convert",
        "mlx_lm.convert",
        "mlx_lm.server",
    ]
    assert all(" is missing: " in each for each in complaints)
    assert "mlx_lm.server cannot be read" in complaints[-1]


def test_source_that_does_not_parse_is_a_complaint_and_not_a_crash(fake_mlx_lm):
    (fake_mlx_lm / "utils.py").write_text("def quantize_model(:\n")
    (complaint,) = matching(TARGETS)
    assert complaint.startswith("mlx_lm.utils:quantize_model is missing: mlx_lm.utils cannot be")


def test_a_signature_that_only_releases_outside_had_does_not_match(fake_mlx_lm):
    (fake_mlx_lm / "generate.py").write_text(
        "@dataclass\nclass Batch:\n"
        "    uids: list\n    y: array\n    logprobs: array\n    max_tokens: list\n"
        "    num_tokens: list\n    cache: list\n"
    )
    shape = "dataclass() (uids, y, logprobs, max_tokens, num_tokens, cache)"
    assert signature.of_release("0.30.0")["mlx_lm.generate:Batch"] == shape
    (complaint,) = matching(["mlx_lm.generate:Batch"])
    assert complaint.startswith(f"mlx_lm.generate:Batch has changed: it is {shape}, but was ")


def test_a_target_that_was_never_recorded_does_not_match(fake_mlx_lm):
    (fake_mlx_lm / "convert.py").write_text("def brand_new(): ...\n")
    (complaint,) = matching(["mlx_lm.convert:brand_new"])
    assert complaint == "mlx_lm.convert:brand_new was never recorded for a supported mlx-lm"


def test_without_mlx_lm_every_target_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_version() is None
    assert matching(["mlx_lm.convert:convert"]) == [
        "mlx_lm.convert:convert is missing: mlx-lm is not installed"
    ]


def test_a_malformed_target_is_an_error(fake_mlx_lm):
    with pytest.raises(ValueError, match="expected 'module:qualname'"):
        matching(["mlx_lm.convert.convert"])


def test_version_is_read_while_mlx_lm_is_being_imported(fake_mlx_lm, monkeypatch):
    (fake_mlx_lm / "__init__.py").write_text(
        "import mlx_optiq_compat\nseen = mlx_optiq_compat.installed_version()\n"
    )
    spec = spec_from_file_location(
        "mlx_lm", fake_mlx_lm / "__init__.py", submodule_search_locations=[str(fake_mlx_lm)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mlx_lm", module)
    spec.loader.exec_module(module)
    assert module.seen == installed_version() == "0.33.0.dev1"


def test_a_module_made_by_hand_has_the_version_of_its_path(fake_mlx_lm, monkeypatch):
    module = ModuleType("mlx_lm")
    monkeypatch.setitem(sys.modules, "mlx_lm", module)
    assert installed_version() is None
    module.__path__ = [str(fake_mlx_lm)]
    assert installed_version() == "0.33.0.dev1"


def test_a_version_file_that_says_nothing_gives_none(fake_mlx_lm):
    (fake_mlx_lm / "_version.py").write_text("from ._build import __version__\n")
    assert installed_version() is None
    (fake_mlx_lm / "_version.py").unlink()
    assert installed_version() is None


@pytest.mark.parametrize("reference", source.REFERENCES)
def test_a_reference_that_is_gone_does_not_match(fake_mlx_lm, reference):
    module, _, name = reference.partition(":")
    path = fake_mlx_lm.joinpath(*module.split(".")[1:]).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"def f():\n    return {name}\n")
    assert matching([reference]) == []
    path.write_text("def f():\n    return None\n")
    (complaint,) = matching([reference])
    assert complaint.startswith(f"{reference} is missing: ")


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ("abcd", "a.."),
        ("abc", "a..c"),
        ("b", "b"),
        ("d", "d.."),
        ("acd", "a, c.."),
        ("abd", "a..b, d.."),
        ("", ""),
    ],
)
def test_spans_shorten_a_list_of_releases_and_back(versions, text):
    releases = tuple("abcd")
    assert signature.spans(versions, releases) == text
    assert signature.unspan(text, releases) == set(versions)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.mlx_lm)
def test_signatures_are_recorded_for_every_row(row):
    assert row.mlx_lm in signature.recorded()[0]
    found = signature.of_release(row.mlx_lm)
    modules = {target.partition(":")[0] for target in found}
    expected = set(source.MODULES)
    # The umbrella command came with 0.30.6.
    assert modules | {"mlx_lm.cli"} == expected


@pytest.mark.parametrize("row", supported(), ids=lambda row: row.mlx_lm)
@pytest.mark.parametrize(
    "module",
    [m for m in source.MODULES if m.count(".") == 1 and not m.endswith(("cli", "utils"))],
)
def test_every_command_binds_argparse_at_module_level(row, module):
    assert signature.of_release(row.mlx_lm)[f"{module}:argparse"] == "import argparse"


def test_recorded_drift_is_what_the_releases_did():
    releases, recorded = signature.recorded()
    with_scale = [
        text for text in recorded["mlx_lm.utils:quantize_model"] if "global_scale" in text
    ]
    (span,) = (recorded["mlx_lm.utils:quantize_model"][text] for text in with_scale)
    assert min(signature.unspan(span, releases)) == "0.32.1"
    moved = recorded["mlx_lm.models.cache:LRUPromptCache"]
    assert min(min(signature.unspan(span, releases)) for span in moved.values()) == "0.31.2"


def test_signatures_equal_the_installed_source():
    version, folder = installed_version(), package_folder()
    assert version is not None
    assert folder is not None
    if version not in signature.recorded()[0]:
        pytest.skip(f"mlx-lm {version} is not recorded")
    assert source.package_signatures(folder) == signature.of_release(version)


def test_record_writes_what_it_reads(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "compat")
    import record

    releases = signature.recorded()[0]
    text = record.render(*record.collapse({each: signature.of_release(each) for each in releases}))
    assert text == signature.FILE.read_text()
    assert json.loads(text)["releases"] == list(releases)


def test_record_check_names_a_difference_and_fails(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "compat")
    import record

    wheel = signature.of_release("0.32.2") | {"mlx_lm.convert:main": "(argv=None)"}
    monkeypatch.setattr(record, "fetch", lambda version: wheel)
    before = signature.FILE.read_bytes()
    assert record.main(["--check", "0.32.2"]) == 1
    said = capsys.readouterr().out
    assert "mlx-lm 0.32.2: mlx_lm.convert:main is (argv=None), recorded as ()" in said
    assert signature.FILE.read_bytes() == before


def test_record_says_which_wheel_it_could_not_fetch(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "compat")
    import record

    def refuse(version):
        raise record.FetchError(f"cannot fetch mlx-lm=={version}: no wheel")

    monkeypatch.setattr(record, "fetch", refuse)
    assert record.main(["--check", "0.99.0"]) == 2
    assert "cannot fetch mlx-lm==0.99.0" in capsys.readouterr().err
