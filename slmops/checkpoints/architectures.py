"""Which architectures can be exported, as tested with onnxruntime-genai 0.14.1 and transformers 5.

The table is written by hand, because the model builder knows some architectures that it exports wrongly or only in
part. Look through it again when either package is upgraded.
"""

import logging

from slmops.core.errors import CheckpointError

log = logging.getLogger(__name__)


def _causal(families: str) -> frozenset[str]:
    return frozenset(f"{family}ForCausalLM" for family in families.split())


PROVEN = _causal("Granite Gemma2 Gemma3 Llama Mistral Phi3 Qwen2 Qwen3 SmolLM3")
"""Each one is exported by an integration test with all that its family has (windows, layers without rotary positions,
scalings), and its logits are compared with the checkpoint's; conversion/fixes.py corrects the exporter."""

UNPROVEN = _causal("Ernie4_5 Gemma GptOss HunYuanDenseV1 InternLM2 Lfm2 Nemotron Olmo Phi Phi3Small") | {
    "ChatGLMForConditionalGeneration",
    "ChatGLMModel",
}
"""Text decoders that the model builder knows and nobody has compared; the check of the fp32 export decides."""

_NOT_TEXT_ONLY = "it is not a text-only model: the model builder exports its text part alone, without embeddings"
_VISION = "Mistral3 Qwen2_5_VL Qwen3VL Qwen3_5 Qwen3_5Moe"

REFUSED = {
    **dict.fromkeys((f"{family}ForConditionalGeneration" for family in _VISION.split()), _NOT_TEXT_ONLY),
    **dict.fromkeys(_causal("Phi3V Phi4MM VideoChatFlashQwen"), _NOT_TEXT_ONLY),
    **dict.fromkeys(_causal("Olmo2 Qwen3Moe"), "the model builder of onnxruntime-genai 0.14.1 does not know it"),
    "Gemma3ForConditionalGeneration": f"{_NOT_TEXT_ONLY}; save its language model by itself as Gemma3ForCausalLM",
    "PhiMoEForCausalLM": "it can be exported at int4 for CUDA only, so there is no fp32 baseline to judge it by",
    "WhisperForConditionalGeneration": "it is not a text-only model: it turns speech into text",
}
"""Architecture and why it is refused."""


def check(architecture: str) -> None:
    """Warn of an architecture that nobody has tested; a CheckpointError if it is unknown or known not to work."""
    if architecture in PROVEN:
        return
    if architecture in UNPROVEN:
        log.warning("%s is not among the architectures tested here; the check of the fp32 export decides", architecture)
        return
    reason = REFUSED.get(architecture, "no exporter is known for it")
    raise CheckpointError(
        f"{architecture} cannot be converted: {reason}.",
        f"Tested: {', '.join(sorted(PROVEN))}. Known but untested: {', '.join(sorted(UNPROVEN))}.",
    )
