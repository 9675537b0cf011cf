"""The contract's structs alone: required fields, descriptions of fields, parts that both dialects share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pem import contract

ROOT = Path(__file__).parents[3]
STRUCTS = [
    struct
    for name in contract.__all__
    if isinstance(struct := getattr(contract, name), type) and issubclass(struct, msgspec.Struct)
]
EACH_STRUCT = pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)


def test_reading_the_contract_takes_msgspec_alone() -> None:
    code = (
        "import sys; sys.path.insert(0, 'client'); import pem.contract\n"
        "print([name for name in ('httpx', 'numpy', 'rich', 'typer', 'serve', 'workers', 'posekit')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_struct_of_the_package_is_among_its_names() -> None:
    folder = ROOT / "client" / "pem" / "contract"
    modules = [f"pem.contract.{path.stem}" for path in folder.glob("[a-z]*.py")]
    defined = {
        value.__name__
        for module in modules
        for value in vars(sys.modules[module]).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module
    }
    assert defined == {struct.__name__ for struct in STRUCTS}


@EACH_STRUCT
def test_a_struct_and_each_of_its_fields_are_described(struct: type[msgspec.Struct]) -> None:
    schema = msgspec.json.schema_components([struct], ref_template="{name}")[1][struct.__name__]
    assert schema["description"]
    for name, field in schema["properties"].items():
        assert field.get("description"), name


@EACH_STRUCT
def test_a_field_of_several_forms_names_them(struct: type[msgspec.Struct]) -> None:
    schema = msgspec.json.schema_components([struct], ref_template="{name}")[1][struct.__name__]
    for name, field in schema["properties"].items():
        assert set(field) - {"description", "default"}, name


def test_both_dialects_share_what_they_ask_and_differ_in_what_refine_means_unasked() -> None:
    shared = set(contract.Asked.__struct_fields__)
    for struct in (contract.PoseRequest, contract.FullPipelineRequest, contract.SegDataRequest):
        assert issubclass(struct, contract.Asked)
        assert shared <= set(struct.__struct_fields__)
    shared_body = {"rgb_image": "", "depth_image": "", "cam_params": {"cam_K": []}}
    first = msgspec.json.encode({**shared_body, "detections": []})
    second = msgspec.json.encode({**shared_body, "seg_data": []})
    assert msgspec.json.decode(first, type=contract.PoseRequest).refine == "auto"
    assert msgspec.json.decode(second, type=contract.SegDataRequest).refine == "none"


@pytest.mark.parametrize("struct", [contract.PoseRequest, contract.FullPipelineRequest, contract.SegDataRequest])
def test_an_unknown_field_of_a_request_is_refused(struct: type[contract.Asked]) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `nonsense`"):
        msgspec.json.decode(b'{"nonsense": 1}', type=struct)
