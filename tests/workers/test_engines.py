"""The engines by name, and their first exercise."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from posekit import geometric
from posekit.engine import Estimate
from posekit.errors import BrokenCheckpoint
from posekit.sam6d.settings import Sam6d
from posekit.synthetic.box import box_instance, box_mesh
from workers.engines import load_engine, practise, versions, with_fixed_versions
from workers.settings import Stages


def test_versions_are_those_of_the_engines() -> None:
    assert versions(Stages()) == {"geometric": load_engine("geometric", device="cpu", threads=1).version}


def test_asking_for_versions_imports_no_torch() -> None:
    code = (
        "import sys; from workers.engines import versions; from posekit.sam6d.settings import Sam6d; "
        "from workers.settings import Stages; "
        "stages = Stages(engines=('sam6d', 'geometric'), sam6d=Sam6d(weights=sys.argv[1])); "
        "print(versions(stages), 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, __file__], check=True, capture_output=True, text=True)
    sha256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert found.stdout.strip() == f"{{'sam6d': '1.{sha256[:8]}', 'geometric': '{geometric.VERSION}'}} False"


def test_models_of_fewer_views_are_of_another_version() -> None:
    fewer = Stages(engines=("sam6d",), sam6d=Sam6d(weights=__file__, views=8))
    assert versions(fewer)["sam6d"].endswith(".v8")


def test_weights_that_were_replaced_since_the_start_are_not_loaded(tmp_path: Path) -> None:
    weights = tmp_path / "some.safetensors"
    weights.write_bytes(b"those of the start")
    started = with_fixed_versions(Stages(engines=("sam6d", "geometric"), sam6d=Sam6d(weights=str(weights))))
    before = versions(started)
    weights.write_bytes(b"others")
    assert versions(started) == before
    assert versions(msgspec.structs.replace(started, versions={})) != before
    with pytest.raises(BrokenCheckpoint, match="replaced since the server started; start it again"):
        load_engine("sam6d", started, device="cpu", threads=1)


def test_only_engines_of_the_start_have_their_version_fixed() -> None:
    assert with_fixed_versions(Stages()).versions == {"geometric": geometric.VERSION}


def test_an_unknown_engine_is_named_beside_those_there_are() -> None:
    with pytest.raises(ValueError, match="'magic'; there are: geometric, sam6d"):
        load_engine("magic", device="cpu", threads=1)


def test_the_first_exercise_is_measured_and_its_model_kept(tmp_path: Path) -> None:
    engine = load_engine("geometric", device="cpu", threads=1)
    assert practise(engine, 2, tmp_path) > 0
    [model] = tmp_path.glob("*/geometric-*.safetensors")
    written = model.stat().st_mtime_ns
    assert practise(engine, 1, tmp_path) > 0
    assert model.stat().st_mtime_ns == written


def test_the_exercise_is_a_scene_that_can_be_solved() -> None:
    engine = load_engine("geometric", device="cpu", threads=1)
    model = engine.onboard("box", box_mesh(), None, lambda _: None)
    [outcome] = engine.estimate([box_instance(1, "box")], {"box": model})
    assert isinstance(outcome, Estimate)
    np.testing.assert_allclose(outcome.T_cam_obj[:3, 3], (0, 0, 0.6), atol=0.002)
