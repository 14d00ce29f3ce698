"""Olive's surgery with little memory makes what it made before, in a child process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, onnx
from olive.model import ONNXModelHandler
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.graph_surgeries import GraphSurgeries
from onnx import helper, numpy_helper
from slmops.conversion import fixes

matrix = np.random.default_rng(0).standard_normal((50, 64), np.float32)

def model(folder):
    inside = [numpy_helper.from_array(matrix, "embed"), numpy_helper.from_array(matrix.T.copy(), "head")]
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["hidden"], name="/embed/Gather"),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="/lm_head/MatMul"),
    ]
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "length"])
    logits, hidden = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "length", size])
        for name, size in (("logits", 50), ("hidden", 64))
    )
    graph = helper.make_graph(nodes, "tied", [ids], [logits], inside, value_info=[hidden])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    folder.mkdir()
    onnx.save(made, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    return ONNXModelHandler(model_path=str(folder), onnx_file_name="model.onnx")

def tied(source, folder):
    surgery = {"surgeries": [{"surgeon": "TieWordEmbeddings"}], "save_as_external_data": True}
    run = create_pass_from_dict(GraphSurgeries, surgery, True, DEFAULT_CPU_ACCELERATOR)
    made = onnx.load(run.run(source, str(folder)).model_path)
    return dict(
        nodes=[[node.op_type, *node.input, *node.output] for node in made.graph.node],
        weights={one.name: numpy_helper.to_array(one).tolist() for one in made.graph.initializer},
    )

here = Path(sys.argv[1])
source = model(here / "source")
before = tied(source, here / "before")
fixes.apply()
print("RESULT" + json.dumps([before, tied(source, here / "after")]))
"""


def test_the_same_is_made(tmp_path: Path) -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], check=True, capture_output=True, text=True).stdout
    before, after = json.loads(said.rpartition("RESULT")[2])
    assert after == before
    assert "MatMul" not in [node[0] for node in after["nodes"]]
    assert "head" not in after["weights"]
