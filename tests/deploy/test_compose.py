"""compose.yaml: its monitoring services start only on request, and only this machine can reach them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.running import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SIGHT = ("prometheus", "grafana")


def test_the_server_starts_alone_unless_asked_otherwise() -> None:
    assert {name for name, service in COMPOSE["services"].items() if "profiles" not in service} == {"server"}
    assert all(COMPOSE["services"][name]["profiles"] == ["sight"] for name in SIGHT)


@pytest.mark.parametrize("name", SIGHT)
def test_what_watches_is_pinned_checked_and_for_this_machine_only(name: str) -> None:
    service = COMPOSE["services"][name]
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SIGHT)
def test_files_of_the_project_are_mounted_read_only_and_are_there(name: str) -> None:
    for volume in COMPOSE["services"][name]["volumes"]:
        source, _, options = volume.rpartition(":") if volume.endswith(":ro") else (volume, "", "")
        here, _, inside = source.partition(":")
        assert inside.startswith("/")
        if here.startswith("./"):
            assert options == "ro"
            assert (ROOT / here).is_dir()
        else:
            assert here in COMPOSE["volumes"]


def test_prometheus_reads_the_server_and_grafana_reads_prometheus() -> None:
    configuration = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (scrape,) = configuration["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["server:8003"]}]
    assert all((ROOT / "deploy/prometheus" / name).is_file() for name in configuration["rule_files"])
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == configuration["global"]["scrape_interval"]


def test_grafana_finds_the_dashboard_where_it_is_mounted() -> None:
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in grafana["volumes"])
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/pem-server.yml").read_text())[
        "providers"
    ]
    folder = ROOT / mounts[provider["options"]["path"]]
    first = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert first.startswith(provider["options"]["path"] + "/")
    assert (folder / first.rpartition("/")[2]).is_file()
    assert (ROOT / mounts["/etc/grafana/provisioning"] / "dashboards").is_dir()


def test_the_password_is_a_variable_and_its_default_is_documented() -> None:
    password = COMPOSE["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
    match = re.fullmatch(r"\$\{GRAFANA_PASSWORD:-(\S+)\}", password)
    assert match is not None
    assert f"`{match[1]}`" in (ROOT / "docs/METRICS.md").read_text()
