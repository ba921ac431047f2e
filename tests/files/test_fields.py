"""Typed fields: floats for integers, strings for lists and true for 1 are refused."""

import pytest

from mlx_optiq_ext.errors import InputError
from mlx_optiq_ext.files import Fields, shown

ENTRY = {
    "bits": 4,
    "float": 4.0,
    "true": True,
    "string": "4",
    "list": [4],
    "object": {"inner": 1},
    "null": None,
    "infinite": float("inf"),
    "huge": 10**400,
}
FIELDS = Fields(ENTRY, "plan.json")


def test_fields_of_the_right_type_are_returned():
    assert FIELDS.integer("bits", 2, 8) == 4
    assert FIELDS.number("bits") == 4.0
    assert FIELDS.number("float") == 4.0
    assert FIELDS.text("string") == "4"
    assert FIELDS.flag("true") is True
    assert FIELDS.items("list") == [4]
    assert FIELDS.table("object").integer("inner") == 1
    assert FIELDS.choice("bits", (2, 4)) == 4


def test_a_default_stands_for_what_is_absent_only():
    assert FIELDS.integer("absent", default=7) == 7
    assert FIELDS.items("absent", default=None) is None
    assert FIELDS.table("absent", default=None) is None
    with pytest.raises(
        InputError, match=r"plan\.json has no absent: give a whole number from 1 to 8"
    ):
        FIELDS.integer("absent", 1, 8)
    with pytest.raises(InputError, match=r"plan\.json: null is None: give a list"):
        FIELDS.items("null", default=[])


@pytest.mark.parametrize(
    ("method", "name", "wanted"),
    [
        *(
            ("integer", name, "whole number")
            for name in ("float", "true", "string", "list", "huge")
        ),
        *(("number", name, "finite number") for name in ("true", "string", "null", "infinite")),
        *(("text", name, "a string") for name in ("bits", "list", "null")),
        *(("flag", name, "true or false") for name in ("bits", "string", "null")),
        *(("items", name, "a list") for name in ("string", "object")),
        *(("table", name, "an object") for name in ("string", "list")),
    ],
)
def test_another_type_is_named_with_file_field_and_remedy(method, name, wanted):
    with pytest.raises(InputError, match=f"^plan.json: {name} is .*: give .*{wanted}") as raised:
        getattr(FIELDS, method)(name)
    assert len(str(raised.value)) < 200


def test_a_choice_tells_numbers_from_what_equals_them():
    for name in ("float", "true", "string"):
        with pytest.raises(InputError, match=f"{name} is .*: give one of 1, 4, 8"):
            FIELDS.choice(name, (1, 4, 8))


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(InputError, match="finite number"):
        FIELDS.number("huge")


def test_what_is_no_object_is_refused_and_long_values_are_shortened():
    with pytest.raises(InputError, match=r"^plan.json, entry 3 is \[1\]: give a JSON object"):
        Fields.of([1], "plan.json, entry 3")
    assert len(shown("a" * 10**6)) < 100
    assert len(shown([["a" * 100] * 100] * 100)) < 1000
