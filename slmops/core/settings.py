"""Where things are. What to do is in :mod:`slmops.core.job`."""

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from slmops.core.validation import ADDRESS_PATTERN, POOL_PATTERN
from slmops.core.values import Frozen


class Pool(Frozen):
    """Machines of one size behind one Prefect work pool."""

    name: str = Field(pattern=POOL_PATTERN, description="The work pool's name in Prefect.")
    memory_gb: float = Field(gt=0, description="What one job may use on any of its machines, in 10^9 bytes.")
    device: Literal["cpu"] = Field("cpu", description="What its machines can convert and measure for.")


class Folder:
    """A folder below ``home``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, settings: "Settings", _: type | None = None) -> Path:
        return settings.home / self._name


class Settings(BaseSettings):
    """Read from ``SLMOPS_*`` environment variables, then from ``.env`` in the current folder."""

    model_config = SettingsConfigDict(
        env_prefix="SLMOPS_",
        env_file=".env",
        env_ignore_empty=True,  # a variable that is empty is not set; one with another name may be
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    home: Path = Field(Path(".slmops"), description="The one folder that holds all state.")
    tracking_uri: str | None = Field(None, validation_alias=AliasChoices("SLMOPS_TRACKING_URI", "MLFLOW_TRACKING_URI"))
    """An MLflow server to use instead of the local one that slmops starts."""
    prefect_api_url: str | None = Field(
        None, validation_alias=AliasChoices("SLMOPS_PREFECT_API_URL", "PREFECT_API_URL")
    )
    """A Prefect server to use instead of the local one that slmops starts."""
    mlflow_ui_url: str | None = Field(None, pattern=ADDRESS_PATTERN)
    """Where people reach MLflow's pages, for links, if it is not the address that slmops uses."""
    prefect_ui_url: str | None = Field(
        None, pattern=ADDRESS_PATTERN, validation_alias=AliasChoices("SLMOPS_PREFECT_UI_URL", "PREFECT_UI_URL")
    )
    """The same of Prefect's pages."""
    mlflow_port: int = Field(5000, ge=1, le=65535, description="First port tried for the local MLflow server.")
    prefect_port: int = Field(4200, ge=1, le=65535, description="First port tried for the local Prefect server.")
    training_timeout_s: float = Field(86400, gt=0, description="Seconds that one fine-tuning may take.")
    conversion_timeout_s: float = Field(7200, gt=0, description="Seconds that one Olive conversion may take.")
    evaluation_timeout_s: float = Field(3600, gt=0, description="Seconds that one variant's evaluation may take.")
    judge_url: str | None = Field(None, pattern=ADDRESS_PATTERN)
    """OpenAI-compatible endpoint for items with match 'judge', such as http://127.0.0.1:11434/v1."""
    judge_model: str | None = Field(None, description="Name of the judging model at that endpoint.")
    judge_api_key: SecretStr | None = Field(None, description="Its key, if it needs one.")
    judge_timeout_s: float = Field(60, gt=0, description="Seconds that one judgement may take.")
    serve_token: SecretStr | None = Field(None, description="Token that clients of `slmops serve` must send.")
    pools: Annotated[tuple[Pool, ...], NoDecode] = ()
    """Prefect work pools to convert and measure on instead of here, as JSON: [{"name": "big", "memory_gb": 64}]."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @field_validator(
        *("tracking_uri", "prefect_api_url", "mlflow_ui_url", "prefect_ui_url"),
        *("judge_url", "judge_model", "judge_api_key", "serve_token"),
        mode="before",
    )
    @classmethod
    def _blank_is_unset(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("pools", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value) if value.strip() else ()
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None

    @field_validator("pools")
    @classmethod
    def _each_once(cls, value: tuple[Pool, ...]) -> tuple[Pool, ...]:
        twice = [name for name, times in Counter(pool.name for pool in value).items() if times > 1]
        if twice:
            raise ValueError(f"names {', '.join(twice)} more than once")
        return value

    checkpoints: ClassVar = Folder("checkpoints")  # those that slmops unpacked or copied, one folder each
    variants: ClassVar = Folder("variants")  # converted ones, one folder each, named by a digest of all inputs
    blobs: ClassVar = Folder("blobs")  # the files of variants, each once: see slmops.core.blobs
    recipes: ClassVar = Folder("recipes")  # files that the user puts there: see slmops.conversion.recipe_files
    measurements: ClassVar = Folder("measurements")  # raw results of jobs: see slmops.evaluation.earlier
    trainings: ClassVar = Folder("trainings")  # fine-tunings, finished or not, each in a folder named in the same way
    foundry: ClassVar = Folder("foundry")  # Foundry Local's application data; its model cache is models/ below it
    deployed: ClassVar = Folder("deployed")  # the same for what was pulled from the registry
    logs: ClassVar = Folder("logs")  # of the servers and of each conversion and evaluation
    locks: ClassVar = Folder("locks")

    @property
    def judge_configured(self) -> bool:
        return bool(self.judge_url and self.judge_model)

    def work(self, name: str) -> Path:
        """Unfinished work of the model ``name``; emptied when its next run begins."""
        return self.home / "work" / name

    @property
    def machine_lock(self) -> Path:
        """The lock of this machine, held while it converts or measures; all homes of one user share it."""
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        return Path(tempfile.gettempdir()) / f"slmops-{user}" / "machine.lock"
