"""The cause of a failure, read from logs as Olive 0.13.0 writes them."""

import pytest

from slmops.conversion.olive_worker import cause, running_pass

NO_CAUSE = "Olive's log names no cause; --log-level debug makes it say more"
START = """\
[2026-11-22 15:28:57,797] [INFO] [run.py:99:run_engine] Running workflow default_workflow
[2026-11-22 15:28:57,824] [INFO] [accelerator_creator.py:200:create_accelerator] Running workflow on accelerator spec: cpu-cpu
[2026-11-22 15:28:58,245] [INFO] [engine.py:665:_run_pass] Running pass export:modelbuilder
"""  # noqa: E501 - as Olive writes them
PRUNED = "[2026-11-22 15:28:58,246] [WARNING] [engine.py:670:_run_pass] Invalid config, pruned.\n"
END = """\
[2026-11-22 15:28:58,390] [INFO] [engine.py:226:run] Run history for cpu-cpu:
[2026-11-22 15:28:58,391] [WARNING] [engine.py:237:run] No output model produced. Please check the log for details.
"""
BAR = "\r".join(f"Loading weights: {n}%|{'█' * (n // 10)}{' ' * (10 - n // 10)}|" for n in (0, 50, 100))
TRACEBACK = """\
[2026-11-22 15:28:59,001] [ERROR] [engine.py:710:_run_pass] Pass run failed.
Traceback (most recent call last):
  File "/venv/olive/engine/engine.py", line 700, in _run_pass
    output_model_config = host.run_pass(p, input_model_config, output_model_path)
  File "/venv/olive/passes/pytorch/quant_utils.py", line 90, in prepare_model
    raised = "RuntimeError: quoted source is no exception"
{exception}
"""


@pytest.mark.parametrize("exception", ["KeyError: 'int8'", "KeyError: <Precision.INT8: 'int8'>"])
def test_int8_of_model_builder_is_explained(exception: str) -> None:
    found = cause(START + BAR + "\n" + TRACEBACK.format(exception=exception) + END)
    assert found.startswith("ModelBuilder has no int8 for the CPU")
    assert found.endswith(f"({exception})")


@pytest.mark.parametrize(
    "exception",
    [
        "AssertionError: group_size 128 does not divide in_features 576",
        "AssertionError",
        "KeyError: 'int80'",
        "olive.common.utils.OlivePassError: something",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the file",
        "RuntimeError: [ONNXRuntimeError] : 1 : FAIL",
    ],
)
def test_the_first_exception_is_the_cause(exception: str) -> None:
    first, second = (TRACEBACK.format(exception=each) for each in (exception, "olive.OlivePassError: another"))
    assert cause(START + first + END) == exception
    assert cause(f"{first}\nDuring handling of it, another exception occurred:\n\n{second}") == exception
    assert cause(START + PRUNED + f"{exception}\n") == exception
    assert cause(f"{START}{BAR}\r{exception}\n{END}") == exception
    assert cause(f"{START}{exception}\r\n{END}") == exception


def test_refused_config_has_the_reason_before_it() -> None:
    said = "[2026-11-22 15:28:58,245] [INFO] [model_builder.py:194:validate_config] FP16 is not supported on CPU.\n"
    other = "GroupQueryAttention (GQA) is used in this model.\n"
    assert cause(START + said + PRUNED + END) == "FP16 is not supported on CPU."
    assert cause(f"{START}{BAR}\r{said}{other}{PRUNED}{END}") == "FP16 is not supported on CPU."
    assert cause(START + PRUNED + END) == "export:modelbuilder does not accept its config, and Olive does not say why"


def test_nothing_telling() -> None:
    unlike = "Checking for Error: none\nNo ValueError: was seen\nSystemExit: 0\nErrors\n"
    # PRUNED alone: the reason was at level INFO, and the log level hid it.
    for log in ("", START + END, PRUNED + END, "\n\n", "Reading layer 3\n" + BAR, unlike):
        assert cause(log) == NO_CAUSE


def test_running_pass() -> None:
    running, _, step = START.splitlines()
    assert running_pass(step) == "modelbuilder"
    assert running_pass(step.replace("export:modelbuilder", "my_step:Rtn")) == "Rtn"
    for line in (running, "Running pass export:modelbuilder", ""):
        assert running_pass(line) is None
