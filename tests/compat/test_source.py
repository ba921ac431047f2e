"""What is read from mlx-lm's source files."""

from mlx_optiq_compat import source


def test_properties_dataclasses_and_class_methods_are_told_apart(tmp_path):
    (tmp_path / "server.py").write_text(
        "@dataclass(frozen=True)\nclass A(Base):\n    x: int\n    y: list = field()\n"
        "    @property\n    def p(self): ...\n    @p.setter\n    def p(self, value): ...\n"
        "    @classmethod\n    def c(cls, *args, **kw): ...\n"
        "class B:\n    class Inner:\n        def f(self, a: int, /, b=-1, *, k: str = 'v'): ...\n"
    )
    assert source.module_signatures(tmp_path, "mlx_lm.server") == {
        "A": "dataclass(Base) (x, y=field())",
        "A.x": "attribute",
        "A.y": "attribute",
        "A.p": "@property (self)",
        "A.c": "@classmethod (cls, *args, **kw)",
        "B": "class()",
        "B.Inner": "class()",
        "B.Inner.f": "(self, a, /, b=-1, *, k='v')",
    }


def test_attributes_imports_and_references_are_read(tmp_path):
    (tmp_path / "tuner").mkdir()
    (tmp_path / "tuner" / "trainer.py").write_text(
        "import mlx.core as mx\nimport mlx.nn\n"
        "from ..utils import save as keep\nfrom os import path\n"
        "class A:\n    kind = 'a'\n"
        "    def __init__(self, other):\n        self.x, self.y = 1, 2\n        other.z = 3\n"
        "def train():\n    @partial(mx.compile, inputs=1)\n    def step(): ...\n"
    )
    assert source.module_signatures(tmp_path, "mlx_lm.tuner.trainer") == {
        "mx": "import mlx.core",
        "mlx": "import mlx",
        "keep": "import mlx_lm.utils.save",
        "A": "class()",
        "A.kind": "attribute",
        "A.x": "attribute",
        "A.y": "attribute",
        "A.__init__": "(self, other)",
        "train": "()",
        "mx.compile": "used",
    }
