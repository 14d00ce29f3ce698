"""Child process: merge an adapter into its base model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.checkpoints.inspection import TEXT_PATTERNS, copy_texts, has_tokenizer, names
from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen

_MOST_DIFFERENCE, _MOST_IN_HALF = 1e-3, 0.1
"""How far logits may be off after merging, relative to their size, and where weights have 2 bytes, which round."""
_OTHER_BASE = "Name the base that it was trained on with --base: a folder or a hub id."


class MergeRequest(Frozen):
    base: Path
    adapter: Path
    folder: Path
    trust_remote_code: bool = False


def handle(request: MergeRequest) -> Frozen:
    """Write the merged checkpoint, in the base's dtype, with the adapter's tokenizer if it has one.

    A CheckpointError says why the adapter does not fit the base, or that PEFT merges it wrongly.
    """
    import torch
    import transformers
    from peft.tuners.tuners_utils import BaseTunerLayer

    base, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        request.base, dtype="auto", output_loading_info=True, trust_remote_code=request.trust_remote_code
    )
    if missing := sorted(loaded["missing_keys"]):
        raise CheckpointError(f"{request.base} does not hold {missing[0]}.", "Use a whole checkpoint as the base.")
    dtype, tied = base.dtype, base.config.tie_word_embeddings
    try:
        model = _adapted(base, request.adapter)
        ids = torch.randint(base.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            beside = model(input_ids=ids).logits.float()
        if tied:
            _untie(model)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):  # layer by layer in fp32: each weight is rounded once
                layer.to(torch.float32)
                layer.merge(safe_merge=True)
                layer.get_base_layer().to(dtype)
        merged = model.merge_and_unload().to(dtype)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):
            raise
        said = " ".join(str(error).split())
        raise CheckpointError(f"{request.adapter} does not fit its base {request.base}: {said}", _OTHER_BASE) from error
    if tied:
        embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        merged.config.tie_word_embeddings = torch.equal(embeddings.weight, head.weight)
        if merged.config.tie_word_embeddings:
            head.weight = embeddings.weight
    with torch.inference_mode():
        off = float((merged(input_ids=ids).logits.float() - beside).norm() / beside.norm())
    if not off <= (_MOST_IN_HALF if dtype.itemsize == 2 else _MOST_DIFFERENCE):
        raise CheckpointError(
            f"{request.adapter} computes something else once it is merged into its base (logits off by {off:.1%}).",
            "Merge it with the program that trained it, and give the merged checkpoint.",
        )
    merged.save_pretrained(request.folder)
    # The adapter's tokenizer if it has one, else the base's.
    own = has_tokenizer(names(request.adapter))
    copy_texts(request.base, request.folder, ("generation_config.json",) if own else TEXT_PATTERNS)
    copy_texts(request.adapter, request.folder, TEXT_PATTERNS if own else ("generation_config.json", "chat_template*"))
    return Frozen()


def _adapted(base: Any, folder: Path) -> Any:
    """The base with the adapter beside it; a ValueError if one has weights that the other has no place for."""
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if unknown := [key for key, value in said.items() if value and not hasattr(config, key)]:
        raise ValueError(f"PEFT {peft.__version__} does not know its setting {unknown[0]}.")
    _resize(base, peft.utils.load_peft_weights(str(folder), device="cpu"))
    config.inference_mode = True
    model = peft.PeftModel(base, config)
    loaded = model.load_adapter(str(folder), "default", torch_device="cpu")
    if loaded.unexpected_keys:
        raise ValueError(f"the base has no place for {loaded.unexpected_keys[0]}.")
    if loaded.missing_keys:
        raise ValueError(f"the adapter lacks {loaded.missing_keys[0]}.")
    return model.eval()


def _resize(base: Any, weights: Mapping[str, Any]) -> None:
    """Give the base as many token embeddings as the adapter was trained with."""
    whole = re.compile(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$")
    held = {found[1]: len(weight) for name, weight in weights.items() if (found := whole.search(name))}
    rows, before = max(held.values(), default=base.config.vocab_size), base.config.vocab_size
    if rows > before and len(held) < (1 if base.config.tie_word_embeddings else 2):
        raise ValueError(f"it was trained with {rows} tokens, the base has {before}, and only {[*held]} is in it.")
    if rows != before:
        base.resize_token_embeddings(rows, mean_resizing=False)


def _untie(model: Any) -> None:
    """Give each module weights of its own, so that merging into one leaves the other alone."""
    import torch

    seen: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in seen:
            module.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        seen.add(id(weight))
