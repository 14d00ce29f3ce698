"""The main job on the real model; then Foundry Local and MLflow are asked without our program."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.report import COLUMNS, SOMETIMES
from tests.application import application

pytestmark = pytest.mark.e2e

NAME = "smollm2-135m-instruct"


def test_it_reports_both_variants_and_takes_int8(comparison: dict[str, Any]) -> None:
    assert comparison["model"] == NAME
    by_name = {variant["name"]: variant for variant in comparison["variants"]}
    assert {name: variant["status"] for name, variant in by_name.items()} == {"fp32": "ok", "int8": "ok"}
    assert comparison["choice"]["variant"] == "int8", comparison["choice"]["reason"]
    for variant in by_name.values():
        assert {metric for _, metric, *_ in COLUMNS} - SOMETIMES <= set(variant["metrics"])
    fp32, int8 = by_name["fp32"]["metrics"], by_name["int8"]["metrics"]
    assert fp32["bits_per_weight"] == pytest.approx(32, abs=0.1)
    assert 8 < int8["bits_per_weight"] < 10
    assert int8["size_ratio"] == pytest.approx(int8["size_mb"] / fp32["size_mb"])
    assert 8 < fp32["perplexity"] < 25  # the text differs a little between Python versions
    assert int8["perplexity_ratio"] < 1.05
    assert fp32["accuracy"] > 0.5


def test_what_it_reports_is_on_disk(comparison: dict[str, Any]) -> None:
    for variant in comparison["variants"]:
        folder = Path(variant["path"])
        manifest = json.loads((folder / "variant.json").read_text())
        assert {file["name"] for file in manifest["files"]} >= {"model.onnx", "genai_config.json", "tokenizer.json"}
        for file in manifest["files"]:
            assert (folder / file["name"]).stat().st_size == file["size"]
        onnx = sum(f["size"] for f in manifest["files"] if ".onnx" in f["name"])
        assert variant["metrics"]["size_mb"] == pytest.approx(onnx / 1e6)


def test_foundry_local_lists_and_answers(slmops: Any, comparison: dict[str, Any]) -> None:
    fp32 = next(variant for variant in comparison["variants"] if variant["name"] == "fp32")
    found = application(slmops.home / "foundry", fp32["foundry_id"])  # with nothing but the SDK
    assert {variant["foundry_id"] for variant in comparison["variants"]} <= set(found["listed"])
    assert "Paris" in found["answers"][fp32["foundry_id"]]["text"]


def test_mlflow_holds_parent_children_and_models(slmops: Any, comparison: dict[str, Any]) -> None:
    api = slmops.json("status")["mlflow"]["url"] + "/api/2.0/mlflow"

    def run(run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{api}/runs/get", params={"run_id": run_id}).json()["run"]
        return found

    parent = run(comparison["run_id"])
    assert parent["info"]["status"] == "FINISHED"
    assert {"key": "slmops.choice", "value": "int8"} in parent["data"]["tags"]
    for variant in comparison["variants"]:
        child = run(variant["run_id"])
        assert {"key": "mlflow.parentRunId", "value": comparison["run_id"]} in child["data"]["tags"]
        logged = {metric["key"]: metric["value"] for metric in child["data"]["metrics"]}
        assert {name: value for name, value in logged.items() if "/" not in name} == pytest.approx(variant["metrics"])
        files = httpx.get(f"{api}/artifacts/list", params={"run_id": variant["run_id"]}).json()["files"]
        assert {file["path"] for file in files} >= {
            *("variant.json", "olive_config.json", "olive.log", "genai_config.json", "inference_model.json"),
            *("file_sizes.json", "answers.json"),
        }
        [logged_model] = child["inputs"]["model_inputs"]
        model = httpx.get(f"{api}/logged-models/{logged_model['model_id']}").json()["model"]
        assert {metric["key"] for metric in model["data"]["metrics"]} >= set(variant["metrics"])
