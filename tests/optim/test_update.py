"""The arguments of the optimizers' ops, each list of which is written once in Python and once in C++."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from fastlm.ops.optim.adafactor import AdafactorOptions, AdafactorUpdate
from fastlm.ops.optim.adamw import AdamOptions, AdamUpdate, adamw
from fastlm.ops.optim.lamb import RatioOptions
from fastlm.ops.optim.sgd import SgdOptions, SgdUpdate
from fastlm.ops.optim.update import UPDATE

RULES = Path(__file__).parents[2] / "csrc" / "rules"
CPP = {"float": "double", "int": "int", "bool": "bool"}


def struct_fields(name: str) -> list[tuple[str, str]]:
    """(name, type) of each field of a struct in csrc/rules, in order."""
    text = "\n".join(path.read_text() for path in sorted(RULES.glob("*.h")))
    body = re.search(rf"^struct {name} {{(.*?)^}};", text, re.MULTILINE | re.DOTALL).group(1)
    declarations = re.findall(r"^\s*([\w:<>]+) ([\w, ]+);", re.sub(r"//.*", "", body), re.MULTILINE)
    return [(field, kind) for kind, fields in declarations for field in fields.split(", ")]


@pytest.mark.parametrize("options", [AdamOptions, RatioOptions, SgdOptions, AdafactorOptions])
def test_options_have_the_fields_of_their_struct(options):
    fields = [(name, CPP[kind.__name__]) for name, kind in get_type_hints(options).items()]
    assert fields == struct_fields(options.__name__)


def test_updates_have_the_fields_of_their_struct():
    assert tuple(name for name, _ in struct_fields("Update")) == UPDATE
    for update in (AdamUpdate, SgdUpdate, AdafactorUpdate):
        assert [name for name in update._fields if name in UPDATE] == list(UPDATE)


def test_a_schema_has_the_fields_in_order():
    """And what is written is marked so, which torch.compile and autograd need to know."""
    arguments = adamw.torch_op._opoverload._schema.arguments
    assert tuple(a.name for a in arguments) == AdamUpdate._fields + AdamOptions._fields
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"params", "masters", "exp_avgs", "exp_avg_sqs", "steps"}
