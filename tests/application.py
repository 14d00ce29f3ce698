"""An application that uses Foundry Local: nothing of slmops in it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

# It does what it is told, line by line, and says what came of it.
APPLICATION = """
import json, sys
import foundry_local_sdk as sdk

home, data, url, override = sys.argv[1:]
manager = sdk.FoundryLocalManager(
    sdk.Configuration(
        app_name="application",
        app_data_dir=data,
        model_cache_dir=f"{home}/models",
        catalog_urls=[(url or "http://127.0.0.1:9/models", override or None)],  # where nobody listens
        disable_nonessential_telemetry=True,
        web=sdk.Configuration.WebService(urls="http://127.0.0.1:0"),
    )
)
catalog = manager.get_catalog() if url else manager.get_catalog(sdk.CatalogType.LOCAL)
show = lambda model: model and [model.alias, model.id, model.is_cached]

def serve():
    manager.start_web_service()
    return manager.urls

def answer(foundry_id, tokens):
    model = catalog.get_model_variant(foundry_id)
    request = sdk.Request()
    request.add_item(sdk.MessageItem.user("What is the capital of France?"))
    with sdk.ChatSession(model) as session:
        search = sdk.SearchOptions(max_output_tokens=tokens, temperature=0.0, do_sample=False)
        session.set_options(sdk.RequestOptions(search=search))
        with session.process_request(request) as response:
            text, usage = response.get_item(0).get_simple_text(), response.get_usage()
    return {"text": text, "tokens": usage.completion_tokens, "path": str(model.get_path())}

commands = {
    "ids": lambda: sorted({one.id for model in catalog.list_models() for one in (model, *model.variants)}),
    "list": lambda: sorted(show(variant) for model in catalog.list_models() for variant in model.variants),
    "model": lambda alias: show(catalog.get_model(alias)),
    "variant": lambda foundry_id: show(catalog.get_model_variant(foundry_id)),
    "versions": lambda alias, name: sorted(model.id for model in catalog.get_model_versions(alias, name)),
    "load": lambda foundry_id: catalog.get_model_variant(foundry_id).load(),
    "unload": lambda foundry_id: catalog.get_model_variant(foundry_id).unload(),
    "answer": answer,
    "serve": serve,
}
for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        said = commands[command](*arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print("ANSWER " + json.dumps(said), flush=True)
"""


class Application:
    """A process with the real SDK and the catalog at ``url``; without one, with the local catalog of a Foundry home."""

    def __init__(self, home: Path, url: str = "", override: str = "") -> None:
        data = home / "application" if url else home
        argv = [sys.executable, "-c", APPLICATION, str(home), str(data), url, override]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def __call__(self, *command: str | int | None) -> Any:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        return "the application died"


def application(home: Path, *wanted: str) -> dict[str, Any]:
    """What an application finds in the Foundry home ``home``: the listed ids, and the answers of those it wants."""
    answers = {}
    with Application(home) as run:
        listed = run("ids")
        for foundry_id in wanted:
            assert run("load", foundry_id) is None
            answers[foundry_id] = run("answer", foundry_id, 24)
            assert run("unload", foundry_id) is None
    return {"listed": listed, "answers": answers}
