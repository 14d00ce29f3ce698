from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import parser

from slmops.conversion import bf16_worker
from slmops.conversion.bf16_worker import RewriteRequest

GRAPH = """
<ir_version: 8, opset_import: ["": 17]>
graph (bfloat16[2, 3] given) => (float[2, 4] logits, bfloat16[2, 4] sigmoid) <{weights}>
{{
    product = MatMul(given, weight)
    sigmoid = Sigmoid(product)
    logits = Cast<to = 1>(product)
}}
"""


def graph() -> tuple[onnx.ModelProto, torch.Tensor]:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    model = parser.parse_model(GRAPH.format(weights="bfloat16[2, 4] product"))
    bits = weight.view(torch.int16).numpy().tobytes()
    model.graph.initializer.append(onnx.helper.make_tensor("weight", onnx.TensorProto.BFLOAT16, (3, 4), bits, raw=True))
    return model, weight


def test_each_result_is_rounded_to_bf16(tmp_path: Path) -> None:
    model, weight = graph()
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    original = tmp_path / "original.onnx"
    onnx.save(model, original)
    (tmp_path / "model.onnx").hardlink_to(original)
    before = original.read_bytes()
    bf16_worker.handle(RewriteRequest(folder=tmp_path))
    assert original.read_bytes() == before
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    given = torch.randn(2, 3, generator=torch.Generator().manual_seed(5)).bfloat16()
    logits, sigmoid = session.run(None, {"given": given.float().numpy()})
    product = (given.float() @ weight.float()).bfloat16()
    np.testing.assert_array_equal(logits, product.float().numpy())
    np.testing.assert_array_equal(sigmoid, product.float().sigmoid().bfloat16().float().numpy())
    assert not np.array_equal(logits, (given.float() @ weight.float()).numpy())


def test_a_graph_without_bf16_stays_as_it_is() -> None:
    text = (
        "<ir_version: 8, opset_import: ['': 17]> graph (float[2] given) => (float[2] result) { result = Relu(given) }"
    )
    model = parser.parse_model(text.replace("'", '"'))
    before = model.SerializeToString()
    assert bf16_worker.for_cpu(model).SerializeToString() == before
