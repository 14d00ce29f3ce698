"""A child process for the tests: the logits of a variant from WebGPU's own kernels, on Vulkan in software.

It needs the package onnxruntime-ep-webgpu, and a Vulkan driver of SwiftShader, which Debian's package chromium brings.
"""

import json
import sys
from pathlib import Path
from typing import Any

DRIVER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")
ENVIRONMENT = {
    "VK_DRIVER_FILES": str(DRIVER),
    "LD_LIBRARY_PATH": str(DRIVER.parent),  # which has the Vulkan loader, too
    "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1",
}
PROVIDER = "WebGpuExecutionProvider"


def main(folder: Path, tokens: Path, target: Path) -> None:
    """Save the logits of ``tokens``, and which operators WebGPU has run."""
    import numpy as np
    import onnxruntime as ort
    import onnxruntime_ep_webgpu

    from slmops.conversion import logits

    ort.register_execution_provider_library("webgpu", onnxruntime_ep_webgpu.get_library_path())
    real, sessions = ort.InferenceSession, []

    def session(graph: bytes, options: ort.SessionOptions, **_: Any) -> ort.InferenceSession:
        options.add_provider_for_devices([one for one in ort.get_ep_devices() if one.ep_name == PROVIDER], {})
        options.enable_profiling, options.profile_file_prefix = True, str(target)
        sessions.append(real(graph, options))
        return sessions[0]

    ort.InferenceSession = session
    found = logits.OnnxModel(folder).logits(np.load(tokens))
    events = json.loads(Path(sessions[0].end_profiling()).read_text(encoding="utf-8"))
    ran = {one["args"]["op_name"] for one in events if one.get("args", {}).get("provider") == PROVIDER}
    np.savez(target, logits=found, operators=sorted(ran))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
