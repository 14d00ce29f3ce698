"""An application that uses Foundry Local: nothing of slmops in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The port is one that nobody listens on: no public catalog.
APPLICATION = """
import json, sys
import foundry_local_sdk as sdk

home, *wanted = sys.argv[1:]
manager = sdk.FoundryLocalManager(
    sdk.Configuration(
        app_name="application",
        app_data_dir=home,
        model_cache_dir=f"{home}/models",
        catalog_urls=[("http://127.0.0.1:9/models", None)],
        disable_nonessential_telemetry=True,
    )
)
catalog = manager.get_catalog(sdk.CatalogType.LOCAL)
listed = {variant.id for model in catalog.list_models() for variant in (model, *model.variants)}
answers = {}
for foundry_id in wanted:
    model = catalog.get_model_variant(foundry_id)
    model.load()
    request = sdk.Request()
    request.add_item(sdk.MessageItem.user("What is the capital of France?"))
    with sdk.ChatSession(model) as session:
        search = sdk.SearchOptions(max_output_tokens=24, temperature=0.0, do_sample=False)
        session.set_options(sdk.RequestOptions(search=search))
        with session.process_request(request) as response:
            answers[foundry_id] = {
                "text": response.get_item(0).get_simple_text(),
                "tokens": response.get_usage().completion_tokens,
                "path": str(model.get_path()),
            }
    model.unload()
print("ANSWER " + json.dumps({"listed": sorted(listed), "answers": answers}), flush=True)
"""


def application(home: Path, *wanted: str) -> dict[str, Any]:
    """What an application finds in the Foundry home ``home``: the listed ids, and the answers of those it wants."""
    argv = [sys.executable, "-c", APPLICATION, str(home), *wanted]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    answer = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answer, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(answer[0].removeprefix("ANSWER "))
    return found
