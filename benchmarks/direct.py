"""A second opinion on speed: Foundry Local's SDK called directly, with nothing of slmops.

    python benchmarks/direct.py HOME FOLDER FOUNDRY_ID TEXT TOKENS REPETITIONS

Prints one JSON line. Of each request: milliseconds to the first token, decoded tokens/s, CPU milliseconds to the first
token and for each later one, and the answer; then the highest resident memory in MB. The folder is laid out already.
"""

import json
import os
import resource
import sys
import time

import foundry_local_sdk as sdk

FIGURES = ("ttft_ms", "decode_tok_s", "first_cpu_ms", "token_cpu_ms", "answer")


def main(home: str, folder: str, foundry_id: str, text: str, tokens: str, repetitions: str) -> None:
    manager = sdk.FoundryLocalManager(
        sdk.Configuration(
            app_name="direct",
            app_data_dir=home,
            model_cache_dir=f"{home}/models",
            logs_dir=f"{home}/logs",
            catalog_urls=[("http://127.0.0.1:9/asset-gallery/v1.0/models", None)],
            disable_nonessential_telemetry=True,
        )
    )
    catalog = manager.get_catalog(sdk.CatalogType.LOCAL)
    if catalog.get_model_variant(foundry_id) is None:
        with sdk.ModelInfoBuilder() as info:
            info.set_string_property("task", "chat-completion")
            catalog.register_model(folder, foundry_id, info)
    model = catalog.get_model_variant(foundry_id)
    model.load()
    ask(model, text, int(tokens))  # the first touches memory for the first time
    ask(model, text, int(tokens))
    measured = [ask(model, text, int(tokens)) for _ in range(int(repetitions))]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({**dict(zip(FIGURES, zip(*measured, strict=True), strict=True)), "peak_mb": peak}), flush=True)
    os._exit(0)


def ask(model: sdk.IModel, text: str, tokens: int) -> tuple[float, float, float, float, str]:
    stamps, cpu, answer = [], [], ""
    with sdk.ChatSession(model) as session:
        session.set_streaming(True)
        session.set_options(
            sdk.RequestOptions(search=sdk.SearchOptions(max_output_tokens=tokens, temperature=0.0, do_sample=False))
        )
        request = sdk.Request().add_item(sdk.MessageItem.user(text))
        started, began = time.perf_counter(), time.process_time()
        with session.process_streaming_request(request) as stream:
            for piece in stream:
                if piece.text:
                    stamps.append(time.perf_counter())
                    cpu.append(time.process_time())
                    answer += piece.text
            with stream.final_response as final:
                generated = final.get_usage().completion_tokens
    later = generated - 1
    return (
        (stamps[0] - started) * 1e3,
        later / (stamps[-1] - stamps[0]),
        (cpu[0] - began) * 1e3,
        (cpu[-1] - cpu[0]) * 1e3 / later,
        answer,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
