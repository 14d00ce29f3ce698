"""The bridge to Prefect's events: new training data, and new versions in the registry."""

import logging

from prefect import flow

from flows.running import named, plainly
from slmops.core.settings import Settings
from slmops.local import stack
from slmops.training.values import News, Retrain
from tasks.news import tell_of_data, tell_of_versions
from tasks.retrain import fetch_data

log = logging.getLogger("slmops.news")


@flow(name="look-for-news", flow_run_name=named("look for news of {request.name}"), persist_result=False)
@plainly
def look_for_news(request: News) -> list[str]:
    """Emit an event for new training data and for each new version; what is there at the first look is not new.

    Data are new until a retraining has used them.

    Returns:
        The resources that the events are about: slmops.data.NAME and slmops.version.NAME.NUMBER.

    Raises:
        SlmopsError: The data cannot be read, or the registry does not answer.
    """
    settings = Settings()
    uri = stack.tracking_uri(settings)
    told = tell_of_versions(request, uri)
    if request.data is not None:
        asked = Retrain(model="-", data=request.data, evaluation_set=request.evaluation_set, name=request.name)
        told += tell_of_data(request, fetch_data(asked, settings, uri), uri)
    log.info("new: %s", ", ".join(told) or "nothing")
    return told
