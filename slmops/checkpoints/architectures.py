"""Which architectures can be exported, as tested with onnxruntime-genai 0.14.1 and transformers 5.

The table is written by hand, because the model builder knows some architectures that it exports wrongly or only in
part. Look through it again when either package is upgraded.
"""

import logging

from slmops.core.errors import CheckpointError

log = logging.getLogger(__name__)

PROVEN = frozenset(
    {
        "GraniteForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    }
)
"""Each one is exported by an integration test with all that its family has (windows, layers without rotary positions,
scalings), and its logits are compared with the checkpoint's; builder_fixes.py corrects what the exporter gets wrong."""

UNPROVEN = frozenset(
    {
        "ChatGLMForConditionalGeneration",
        "ChatGLMModel",
        "Ernie4_5ForCausalLM",
        "GemmaForCausalLM",
        "GptOssForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "InternLM2ForCausalLM",
        "Lfm2ForCausalLM",
        "NemotronForCausalLM",
        "OlmoForCausalLM",
        "PhiForCausalLM",
        "Phi3SmallForCausalLM",
    }
)
"""Text decoders that the model builder knows and nobody has compared; the check of the fp32 export decides."""

_NOT_TEXT_ONLY = "it is not a text-only model: the model builder exports its text part alone, without embeddings"
_UNKNOWN_TO_BUILDER = "the model builder of onnxruntime-genai 0.14.1 does not know it"

REFUSED = {
    "Gemma3ForConditionalGeneration": f"{_NOT_TEXT_ONLY}; save its language model by itself as Gemma3ForCausalLM",
    "Mistral3ForConditionalGeneration": _NOT_TEXT_ONLY,
    "Olmo2ForCausalLM": _UNKNOWN_TO_BUILDER,
    "Phi3VForCausalLM": _NOT_TEXT_ONLY,
    "Phi4MMForCausalLM": _NOT_TEXT_ONLY,
    "PhiMoEForCausalLM": "it can be exported at int4 for CUDA only, so there is no fp32 baseline to judge it by",
    "Qwen2_5_VLForConditionalGeneration": _NOT_TEXT_ONLY,
    "Qwen3MoeForCausalLM": _UNKNOWN_TO_BUILDER,
    "Qwen3VLForConditionalGeneration": _NOT_TEXT_ONLY,
    "Qwen3_5ForConditionalGeneration": _NOT_TEXT_ONLY,
    "Qwen3_5MoeForConditionalGeneration": _NOT_TEXT_ONLY,
    "VideoChatFlashQwenForCausalLM": _NOT_TEXT_ONLY,
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
