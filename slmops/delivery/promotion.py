"""Which version is to be deployed, and whether it may be: its job's gates applied again, against today's champion."""

from pydantic import Field

from slmops.core.errors import GateError, UsageError
from slmops.core.targets import target_of
from slmops.core.values import Frozen, GateResult
from slmops.foundry.versions import ModelVersion, Promotion
from slmops.selection import choice as selection
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker


class Decision(Frozen):
    """What speaks for a challenger and what speaks against it."""

    challenger: ModelVersion
    champion: ModelVersion | None
    gates: tuple[GateResult, ...]
    differs: tuple[str, ...] = Field(description="The conditions in which the two were measured differently.")
    elsewhere: str | None = Field(None, description="Why their speeds are not compared; None: they are.")
    others: tuple["Decision", ...] = Field((), description="Decisions about the release's versions for other targets.")

    @property
    def against(self) -> list[str]:
        """Why it is refused, or one for another target is; empty if none is."""
        said = [gate.detail for gate in self.gates if gate.refuses]
        if self.differs and self.champion is not None:
            same = f"the same {' and '.join(self.differs)}, so they cannot be compared"
            said.append(f"{self.champion.label} and {self.challenger.label} were not measured with {same}")
        return said + [f"{one.challenger.variant}: {why}" for one in self.others for why in one.against]


def decide(uri: str, request: Promotion) -> Decision:
    """Judge the version that was asked for, or raise a UsageError if there is none, against the champion of now.

    With the choice of a job come its choices for other targets: they are one release.
    """
    registry, tracker = Registry(uri), Tracker(uri)
    challenger, champion = pick(registry, tracker, request), registry.champion(request.name)
    comparison, _ = tracker.judged(challenger.job_id)
    chosen = {one.name: one for one in comparison.chosen}
    first = chosen.pop(comparison.choice.variant or "", None)
    numbers = [one.version for one in chosen.values() if first and first.version == challenger.version]
    deployed = {target_of(one.variant): one for one in registry.release(champion)} if champion else {}
    versions = [registry.find(request.name, str(number)) for number in numbers]
    others = [judge(tracker, one, deployed.get(target_of(one.variant), champion)) for one in versions]
    return judge(tracker, challenger, champion).model_copy(update={"others": tuple(others)})


def pick(registry: Registry, tracker: Tracker, request: Promotion) -> ModelVersion:
    """The version that was asked for: by number, by precision, or the choice of the latest comparison."""
    if request.version is not None and request.precision is not None:
        raise UsageError("--precision and --version both name a version.", "Give only one of them.")
    if request.version is not None:
        return registry.find(request.name, str(request.version))
    if request.precision is not None:
        return registry.newest(request.name, request.precision)
    comparison = tracker.latest(request.name)
    chosen = next((one for one in comparison.variants if one.name == comparison.choice.variant), None)
    if chosen is None or chosen.version is None:
        problem = f"The latest comparison of {request.name} chose nothing that can be promoted"
        fix = "Name a version with --precision or --version."
        raise UsageError(f"{problem}: {comparison.choice.reason}", fix)
    return registry.find(request.name, str(chosen.version))


def judge(tracker: Tracker, challenger: ModelVersion, champion: ModelVersion | None) -> Decision:
    """Apply the policy of the challenger's job, whose comparison must have it, to its figures and the champion's."""
    comparison, policy = tracker.judged(challenger.job_id)
    result = next((one for one in comparison.variants if one.run_id == challenger.run_id), None)
    if result is None:
        problem = f"The evaluation of {challenger.label} is not in the comparison of its job."
        raise UsageError(problem, "Measure it again.")
    differs: tuple[str, ...] = ()
    figures = elsewhere = None
    if champion is not None:
        figures = tracker.champion(challenger.name, challenger.run_id)
        differs = tracker.differences(challenger.run_id, champion.run_id)
        theirs, ours = tracker.hardware_kind(champion.run_id), tracker.hardware_kind(challenger.run_id)
        if theirs != ours:
            kinds = f"another kind of machine ({theirs}; not {ours})"
            elsewhere = f"The speed of the champion was measured on {kinds}: speeds are not compared."
    baseline = comparison.baseline or selection.find_baseline(comparison.variants)
    gates = selection.apply(policy, result, baseline, figures)
    return Decision(challenger=challenger, champion=champion, gates=gates, differs=differs, elsewhere=elsewhere)


def refuse(decision: Decision) -> GateError | None:
    """The error that says why a challenger may not be promoted; None if it may."""
    if not decision.against:
        return None
    challenger, champion = decision.challenger, decision.champion
    fix = f"`slmops promote {challenger.name} --version {challenger.version} --force REASON` overrides it."
    if decision.differs and champion is not None:
        source = champion.tags.get("slmops.source", "its checkpoint")
        again = f"slmops run --model {source} --name {champion.name}"
        fix = f"Measure {champion.label} with the same (`{again}`), then promote again. Or: {fix}"
    return GateError(f"{challenger.label} is not promoted: {'; '.join(decision.against)}.", fix)


def text(decision: Decision, request: Promotion) -> str:
    """What a person looks at before deciding, in Markdown."""
    champion = decision.champion.label if decision.champion else "nothing is deployed yet"
    gates = [f"- {gate.outcome}: {gate.detail}" for gate in decision.gates if gate.outcome != "skipped"]
    others = ", ".join(one.challenger.label for one in decision.others)
    title = f"**{decision.challenger.label}** is to replace: {champion}." + f" With it: {others}." * bool(others)
    lines = [title, "", *(gates or ["No gate applies."])]
    if decision.elsewhere:
        lines.append(f"- note: {decision.elsewhere}")
    against = [f"- {said}" for said in decision.against]
    lines += ["", *(["Against it:", *against] if against else ["Nothing speaks against it."])]
    if request.force:
        lines.append(f"Forced: {request.force}")
    return "\n".join(lines)
