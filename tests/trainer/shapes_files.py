"""Samples of the shapes world as files in the schemas of real data."""

import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from prism.models.vocabulary import PLACEHOLDER
from prism.worlds.shapes.scenes import Bytes
from prism.worlds.shapes.world import ShapesSample
from prism_kernels.grammar import Sections

_ROW_GROUP = 256


def write_sft(path: str | Path, samples: Iterable[ShapesSample]) -> int:
    """Writes sharegpt-multimodal rows, as JSONL with PNG files or as parquet by the name, and returns their number."""
    path = Path(path)

    def row(sample: ShapesSample) -> dict[str, Any]:
        turns = [("user", PLACEHOLDER + sample.question.text), ("assistant", sample.response.text)]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"id": sample.id, "messages": messages, "images": [_image(path, sample)]}

    return _write(path, map(row, samples))


def write_warmup(path: str | Path, pairs: Iterable[tuple[ShapesSample, Sections, Sections]]) -> int:
    """Writes rows for the discriminator's warm-up: each sample with a teacher's and a student's sections."""
    path = Path(path)

    def row(pair: tuple[ShapesSample, Sections, Sections]) -> dict[str, Any]:
        sample, teacher, student = pair
        return {
            "id": sample.id,
            "image": _image(path, sample),
            "question": sample.question.text,
            **{f"{who}_caption": sections.caption for who, sections in (("teacher", teacher), ("student", student))},
            **{f"{who}_cot": _cot(sections) for who, sections in (("teacher", teacher), ("student", student))},
        }

    return _write(path, map(row, pairs))


def write_problems(path: str | Path, samples: Iterable[ShapesSample]) -> int:
    """Writes problems for alignment and RLVR; the samples' responses are the teacher's."""
    path = Path(path)

    def row(sample: ShapesSample) -> dict[str, Any]:
        sections = sample.response.sections
        return {
            "images": [_image(path, sample)],
            "data_source": f"shapes/{sample.question.kind}",
            "prompt": [{"role": "user", "content": PLACEHOLDER + sample.question.text}],
            "teacher_caption": sections.caption,
            "teacher_cot": _cot(sections),
            "teacher_response": sections.text,
            "answer": sample.answer,
            "reward_model": {"ground_truth": sample.answer, "style": "rule"},
            "extra_info": {"id": sample.id, "split": sample.split},
        }

    return _write(path, map(row, samples))


def png(image: Bytes) -> bytes:
    """Returns an image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _cot(sections: Sections) -> str:
    return f"<think>{sections.think}</think><answer>{sections.answer}</answer>"


def _image(path: Path, sample: ShapesSample) -> Any:
    """Returns an image as a row refers to it: its bytes in parquet, the name of its file in JSONL."""
    if path.suffix == ".parquet":
        return {"bytes": png(sample.image), "path": None}
    folder = path.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{sample.id}.png").write_bytes(png(sample.image))
    return f"images/{sample.id}.png"


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        count = 0
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                count += 1
        return count
    if path.suffix != ".parquet":
        raise ValueError(f"write: expected a name ending in .jsonl or .parquet, got {path.name!r}")
    return _write_parquet(path, rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError(f"write: expected pyarrow, to write parquet: pip install pyarrow ({error})") from None
    count, writer = 0, None
    try:
        while group := list(islice(rows, _ROW_GROUP)):
            table = arrow.Table.from_pylist(group, schema=writer.schema if writer else None)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(group)
    finally:
        if writer:
            writer.close()
    return count
