"""What is out of scope is refused with a cause: videos and sound in rows of every schema, and in prompts."""

import pytest
from plain_folder import chat, problem

from prism.data.files import RowError
from prism.data.images import ImageLimits
from prism.data.rows import READERS
from prism.models.prompts import chat_messages

PARTS = {f"{who}_{part}": "c" for who in ("teacher", "student") for part in ("caption", "cot")}
ROWS = {"chat": chat("?"), "problem": problem("?"), "warmup": {"question": "?", **PARTS}}


def with_text(schema, content):
    """A row whose user's message has this content."""
    if schema == "warmup":
        return ROWS[schema] | {"question": content}
    field = "prompt" if schema == "problem" else "messages"
    first, *rest = ROWS[schema][field]
    return ROWS[schema] | {field: [first | {"content": content}, *rest]}


def read(schema, row, tmp_path):
    return READERS[schema](row, "row", tmp_path, ImageLimits())


@pytest.mark.parametrize("schema", ROWS)
def test_rows_with_videos_are_refused(schema, tmp_path):
    for column in ("videos", "audios", "video"):
        with pytest.raises(RowError, match=rf"{column}: expected no {column.rstrip('s')}s, .* only images") as error:
            read(schema, ROWS[schema] | {column: ["a.mp4"]}, tmp_path)
        assert error.value.cause == "unsupported field"
    for text in ("<video>How many?", "<image>\n<video>"):
        with pytest.raises(RowError, match=r"expected no videos, .* only images are read") as error:
            read(schema, with_text(schema, text), tmp_path)
        assert error.value.cause == "unsupported field"
    # a column of a parquet file may be empty, and other words of angle brackets are text
    for empty in ([], None):
        read(schema, ROWS[schema] | {"videos": empty}, tmp_path)
    read(schema, with_text(schema, "what does <video controls> or video mean?"), tmp_path)


@pytest.mark.parametrize("schema", ["chat", "problem"])
@pytest.mark.parametrize(
    "item", [{"type": "video"}, {"type": "video_url", "video_url": {"url": "x"}}, {"type": "audio", "text": None}]
)
def test_items_of_a_chat_that_are_no_images_are_refused(schema, item, tmp_path):
    content = [{"type": "text", "text": "What happens?"}, item]
    with pytest.raises(RowError, match=r"expected no (video|audio)s, .* only images are read") as error:
        read(schema, with_text(schema, content), tmp_path)
    assert error.value.cause == "unsupported field"


@pytest.mark.parametrize("item", [{"type": "video", "video": "a.mp4"}, {"type": "audio"}, {"typ": "image"}])
def test_prompts_of_the_library_with_other_items_are_refused(item):
    with pytest.raises(ValueError, match=r"expected text and image items in a message, got "):
        chat_messages([{"role": "user", "content": [item]}])
    for image in ({"type": "image"}, {"type": "image_url"}, {"image": "a.png"}):
        assert chat_messages([{"role": "user", "content": [image]}])[0]["content"] == [{"type": "image"}]
