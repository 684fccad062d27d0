"""What the models of the settings are made of: strict, frozen tables; "none" stands for None."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _none(value: Any) -> Any:
    return None if value == "none" else value


def as_tuple(value: Any) -> Any:
    """Returns a list or a text with commas as a tuple, anything else as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


NONE = BeforeValidator(_none)
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# strict models take no list for a tuple; a flag may separate by commas
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Two = Annotated[tuple[float, float], BeforeValidator(as_tuple)]


class ConfigError(ValueError):
    """Settings that cannot be used: one line for each problem, with its key."""


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
