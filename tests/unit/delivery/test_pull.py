"""Which version a device gets, and what is installed there in the end."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.core import machine
from slmops.core.errors import PrerequisiteError, RegistrationError, SlmopsError, TrackingError, UsageError
from slmops.delivery import installed, pull
from slmops.foundry import cli, layout
from slmops.foundry.versions import RELEASE, VERSION_MANIFEST, Installed, ModelVersion
from tests import values
from tests.pulled import BIG, CRASHED, FILES, Device, contents, described, digest, names


def test_a_version_is_installed_as_the_registry_has_it(device: Device) -> None:
    plain = {".config", "a.b-c_d", "ä/ö ü.txt", "a/b/c", "x.part", "..x", "inference_model.json.txt"}
    device.serve(**dict.fromkeys(plain, b"content"))
    given = {"Name": "evil:1", "Version": "9"}  # which the manifest cannot decide
    device.remote.describe(inference_model={**device.remote.manifest.inference_model, **given})
    done = device.install()
    folder = device.settings.deployed / "models" / "slmops" / "bot-int8-generic-cpu-3"
    assert done == Installed(name="bot", version=3, variant="int8", foundry_id="bot-int8-generic-cpu:3", folder=folder)
    found = contents(folder)
    assert json.loads(found.pop("inference_model.json")) == {
        "Name": "bot-int8-generic-cpu:3",
        "Version": "3",
        "PromptTemplate": {"prompt": "{Content}"},
        "Description": "né",
    }
    assert found == {**FILES, **dict.fromkeys(plain, b"content"), VERSION_MANIFEST: device.remote.text}
    assert device.registered == ["bot-int8-generic-cpu:3"]
    assert device.seen == [names(folder)]  # it was whole when Foundry Local saw it
    assert names(device.settings.deployed / "downloads") == set()
    assert installed.versions("bot", device.settings) == [done]
    assert installed.current("bot", device.settings) is None  # that is for make_current to say


def test_a_device_gets_its_own_number_of_threads_and_with_other_cores_another_one(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = b'{"model": {"type": "llama"}}'
    device.serve(**{"genai_config.json": released})
    for cores in (2, 4):
        monkeypatch.setattr(machine, "physical_cores", lambda cores=cores: cores)
        folder = device.install().folder
        config = json.loads((folder / "genai_config.json").read_text())
        assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == cores
        assert (folder / layout.RELEASED_CONFIG).read_bytes() == released
    assert device.remote.offsets() == [0]
    assert "replacing" not in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", "a/../../x", "a/..", "/x", "/etc/passwd", "//server/share", "a//b", "a/", "", ".", "./x"),
        *("a\\b", "..\\x", "C:x", "C:\\x", "C:/x", "file:x", "x:stream", "x\x00y", "x\ny", ".. /x", ".../x", "x. "),
        *(VERSION_MANIFEST, "Deployment.JSON", "inference_model.json", "inference_model.json/x"),
        *("model.onnx", "MODEL.onnx", "model.onnx/x"),
    ],
)
def test_names_that_cannot_be_files_of_a_version(device: Device, name: str) -> None:
    device.remote.files[name] = b"evil"
    device.remote.describe(files=(*described(FILES), *described({name: b"evil"})))
    said = device.refuses(TrackingError, r"deployment.json of bot version 3 \(int8\) names ").message
    assert repr(name) in said or "as a file and as a folder" in said
    assert device.remote.paths == {VERSION_MANIFEST}
    written = names(device.settings.deployed)
    assert written == {f"downloads/{digest(device.remote.text)}/{VERSION_MANIFEST}.part"}
    assert names(device.settings.home) - {f"deployed/{path}" for path in written} <= {"locks/pull-bot.lock"}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"variant": "../../x"}, TrackingError, r"bot version 3 \(\.\./\.\./x\)"),
        ({"manifest_sha256": "../" * 21 + "x"}, TrackingError, "slmops"),
        ({"manifest_sha256": "A" * 64}, TrackingError, "slmops"),
        ({"manifest_sha256": "0" * 64}, TrackingError, r"^deployment.json of bot version 3 \(int8\) was altered"),
        ({"name": "../x"}, UsageError, "'../x'"),
        ({"variant": "int4"}, TrackingError, r"deployment.json of bot version 3 \(int4\)"),
        ({"name": "other"}, TrackingError, r"deployment.json of other version 3 \(int8\)"),
    ],
)
def test_a_version_that_makes_no_sense(device: Device, changes: dict[str, str], error: Any, said: str) -> None:
    device.refuses(error, said, **changes)
    assert device.remote.paths <= {VERSION_MANIFEST}
    assert names(device.settings.deployed) <= {f"downloads/{digest(device.remote.text)}/{VERSION_MANIFEST}.part"}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model": "bot"}'])
def test_a_manifest_of_another_kind(device: Device, text: bytes) -> None:
    device.remote.answers[VERSION_MANIFEST] = [text, text]
    error = device.refuses(TrackingError, r"deployment\.json", manifest_sha256=digest(text))
    assert "newer slmops" in str(error.fix)


def test_another_model_whose_folder_would_be_the_same(device: Device) -> None:
    device.serve("bot-two", "int8")
    first = device.install()
    device.serve("bot", "two-int8")
    device.refuses(RegistrationError, "bot-two")
    assert (installed.versions("bot-two", device.settings), device.here()) == ([first], [])


@pytest.mark.parametrize(
    "served",
    [
        pytest.param({"number": 4}, id="a new version is removed and the one before stays"),
        pytest.param({BIG: b"other weights"}, id="what was to be replaced comes back"),
        pytest.param({}, id="an installed version that stops answering is not removed"),
    ],
)
def test_a_version_that_does_not_answer_changes_nothing(device: Device, served: dict[str, Any]) -> None:
    first = device.install()
    installed.make_current(first, device.settings)
    before = contents(device.settings.deployed)
    device.serve(**served)
    device.fails = CRASHED
    device.refuses(RegistrationError, "SIGSEGV")
    assert device.forgotten == [f"bot-int8-generic-cpu:{device.remote.number}"]
    assert contents(device.settings.deployed) == before
    assert (installed.current("bot", device.settings), installed.versions("bot", device.settings)) == (first, [first])


@pytest.mark.parametrize("step", ["confirm", "ask"])
def test_foundrys_command_refuses_it(device: Device, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def no(called: str, folder: Path, *_: str) -> None:
        assert (called, folder) == ("bot-int8-generic-cpu", device.settings.deployed / "models")
        raise RegistrationError(f"foundry does not {step}.")

    monkeypatch.setattr(cli, step, no)
    device.refuses(RegistrationError, f"foundry does not {step}")
    assert device.registered == device.here() == []


def test_references() -> None:
    assert pull.split("bot") == ("bot", None)
    for which in ("int8", "3", "champion"):
        assert pull.split(f"support-bot_2@{which}") == ("support-bot_2", which)
    wrong = ("", "@", "bot@", "@int8", "bot@a@b", "bot int8", " bot", "bot\n", "org/bot", "../bot", "bot@../x", "bot:3")
    for reference in wrong:
        with pytest.raises(UsageError, match=re.escape(repr(reference))):
            pull.split(reference)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"memory_mb": 8000.5}, "8000 MB of memory")],
)
def test_a_version_that_does_not_fit_is_not_fetched(device: Device, changes: dict[str, Any], said: str) -> None:
    device.refuses(PrerequisiteError, said, **changes)
    assert device.remote.asked == []
    assert device.install(memory_mb=8000)


def registry(versions: Sequence[ModelVersion], champion: ModelVersion | None = None) -> Any:
    def find(name: str, which: str) -> ModelVersion:
        for one in versions:
            if which == one.variant:
                return one
        raise UsageError(f"There is no {name}@{which}.")

    return SimpleNamespace(
        versions={"bot": versions}.__getitem__,
        champion={"bot": champion}.__getitem__,
        find=find,
        release=lambda one: [one, *(other for other in versions if str(other.version) in one.others)],
    )


def listed(number: int, variant: str, size_mb: float, memory_mb: float, **changes: Any) -> ModelVersion:
    fields = {"size_mb": size_mb, "memory_mb": memory_mb, "job_id": "job", **changes}
    return values.model_version(number, variant=variant, **fields)


FP32 = listed(5, "fp32", 600, 9000)
FP16 = listed(6, "fp16", 300, 8100)
INT8 = listed(3, "int8", 150, 7000)
INT4 = listed(4, "int4", 100, 5000)
INT4_AGAIN = listed(7, "int4", 100, 5000)
OLDER = listed(2, "int8", 200, 1000, job_id="older")
GPU = listed(8, "int4-cuda", 160, 100, device="gpu", provider="CUDAExecutionProvider")
WEBGPU = listed(9, "int4-webgpu", 160, 100, device="gpu", provider="WebGpuExecutionProvider")
HUGE = listed(1, "fp32", 8001, 0)
RELEASED = listed(3, "int8", 150, 7000, tags={RELEASE: "9 8"})


@pytest.mark.parametrize(
    ("providers", "expected"),
    [
        ((), RELEASED),
        (("WebGpuExecutionProvider",), WEBGPU),
        (("WebGpuExecutionProvider", "CUDAExecutionProvider"), GPU),
    ],
)
def test_of_a_release_a_device_takes_what_its_best_provider_runs(
    device: Device, providers: tuple[str, ...], expected: ModelVersion, caplog: pytest.LogCaptureFixture
) -> None:
    device.providers = providers
    versions = registry([RELEASED, INT4, GPU, WEBGPU], RELEASED)
    assert pull.fitting(versions, "bot", None, device.settings) == expected
    device.fails = CRASHED  # of a driver, and the CPU is still there
    assert pull.fitting(versions, "bot", None, device.settings) == RELEASED
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("versions", "champion", "which", "expected"),
    [
        pytest.param([INT8, INT4], INT8, None, INT8, id="the champion fits"),
        pytest.param([FP32, INT8, INT4], FP32, None, INT8, id="the largest that fits"),
        pytest.param([INT4, FP32, INT8], FP32, None, INT8, id="in whatever order"),
        pytest.param([FP32, INT4, OLDER], FP32, None, INT4, id="of the same job"),
        pytest.param([FP32, GPU, INT4], FP32, None, INT4, id="not for a GPU"),
        pytest.param([HUGE, INT4], HUGE, None, INT4, id="of what was not measured, the files have to fit"),
        pytest.param([GPU, INT4], GPU, None, INT4, id="the champion is for a GPU"),
        pytest.param([FP32, INT4, INT4_AGAIN], FP32, None, INT4_AGAIN, id="the newer of two alike"),
        pytest.param([INT8, INT4], INT8, "int4", INT4, id="by alias"),
    ],
)
def test_the_choice(
    device: Device,
    versions: list[ModelVersion],
    champion: Any,
    which: str | None,
    expected: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert pull.fitting(registry(versions, champion), "bot", which, device.settings) == expected
    if which is None and expected != champion:
        assert champion.label in caplog.text
        assert expected.label in caplog.text
    else:
        assert caplog.text == ""


@pytest.mark.parametrize(
    ("versions", "champion", "which", "error", "said"),
    [
        ([INT8], None, None, UsageError, ["bot"]),
        ([INT8], INT8, "fp64", UsageError, ["bot@fp64"]),
        ([FP32, INT4], INT4, "fp32", PrerequisiteError, [FP32.label, "9000 MB", "8000 MB"]),
        ([INT4, GPU], INT4, "int4-cuda", PrerequisiteError, [GPU.label, "gpu, and there is no CUDAExecutionProvider"]),
        ([FP32, FP16, OLDER], FP32, None, PrerequisiteError, [FP32.label, "9000 MB", FP16.label, "8100 MB"]),
    ],
)
def test_no_choice(
    device: Device,
    versions: list[ModelVersion],
    champion: Any,
    which: str | None,
    error: type[SlmopsError],
    said: Sequence[str],
) -> None:
    with pytest.raises(error) as caught:
        pull.fitting(registry(versions, champion), "bot", which, device.settings)
    assert all(one in caught.value.message for one in said)
    assert OLDER.label not in caught.value.message
