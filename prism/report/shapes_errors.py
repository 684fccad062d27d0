"""The embedded world's problems of a run, drawn again by their names."""

import base64
import io
import re
from functools import cached_property

from PIL import Image

from prism.data.errors import DataError
from prism.report.reading import Row, RunRecord
from prism.worlds.shapes.world import SPLITS, Carelessness, Sample, ShapesWorld

_NAME = re.compile(r"([a-z]+)-(\d+)-(\d{6,})")


class World:
    """Problems by name; none where the run was on files.

    Args:
        record: of the run.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._known: dict[str, Sample] = {}

    @cached_property
    def _world(self) -> ShapesWorld:
        found = self.record.settings["data"]["shapes"]
        try:
            return ShapesWorld(found["seed"], Carelessness(**found["carelessness"]))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.record.folder / 'config.json'}: expected data.shapes as this version has it, "
                f"got {error}; write the report with the version that the run was made with"
            ) from error

    def problem(self, row: Row) -> Sample | None:
        """Returns the problem of a recorded response; None where this world has no such one."""
        match = _NAME.fullmatch(str(row.get("problem")))
        if self.record.setting("data.source") != "shapes" or match is None or match[1] not in SPLITS:
            return None
        name = match[0]
        if name not in self._known:
            (self._known[name],) = self._world.samples(match[1], 1, int(match[3]))
        sample = self._known[name]
        # a world of another version would show an image that the policy never saw
        same = (sample.id, sample.question.text, sample.answer) == (name, row.get("question"), row.get("answer"))
        return sample if same else None


def inline_png(sample: Sample) -> str:
    """Returns a problem's image as the source of an HTML image."""
    file = io.BytesIO()
    Image.fromarray(sample.image).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
