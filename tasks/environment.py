"""Is everything there that a job needs, and getting what can be got."""

from slmops.core.settings import Settings
from slmops.local import doctor
from tasks.stage import stage


@stage()
def check_environment(settings: Settings) -> None:
    """All checks of ``slmops doctor`` that take no time; it is a PrerequisiteError if one fails."""
    doctor.require(doctor.check(settings, imports=False))


check_everything = stage("check everything")(doctor.check)
install_tested_packages = stage("install tested packages")(doctor.fix)
build_onnxruntime_genai = stage("build onnxruntime genai")(doctor.build_genai)
