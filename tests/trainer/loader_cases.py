"""Files for the tests of the loaders."""

import json
import struct
import zlib

import numpy as np
from shapes_files import png

RESPONSE = "<caption>\n- red circle north\n</caption>\n<think>\n1. So 1.\n</think>\n<answer>1</answer>"


def picture(width=32, height=32, seed=0):
    return png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_size(png_bytes, width, height):
    """Returns a PNG whose header claims another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png_bytes[24:29]
    return png_bytes[:12] + header + struct.pack(">I", zlib.crc32(header)) + png_bytes[33:]


# an image that would not fit into memory
HUGE = with_size(picture(), 30000, 20000)
GOOD, LARGE, THIN, DOT = picture(), picture(64, 64), picture(width=900, height=4), picture(width=1, height=1)


def write_images(folder):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images/good.png").write_bytes(GOOD)
    (folder / "images/half.png").write_bytes(LARGE[:3000])
    (folder / "images/text.png").write_text("this is no image")
    (folder / "images/thin.png").write_bytes(THIN)
    (folder / "images/dot.png").write_bytes(DOT)
    (folder / "images/huge.png").write_bytes(HUGE)


def write_lines(path, rows):
    """Writes rows as lines of JSON; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def chat(number=0, **changes):
    row = {
        "id": f"c{number}",
        "messages": [
            {"role": "user", "content": "<image>How many?"},
            {"role": "assistant", "content": RESPONSE},
        ],
        "images": ["images/good.png"],
    }
    return {**row, **changes}


def warmup(number=0, **changes):
    row = {
        "id": f"w{number}",
        "image": "images/good.png",
        "question": "How many?",
        "teacher_caption": "- red circle north",
        "teacher_cot": "<think>1. So 1.</think><answer>1</answer>",
        "student_caption": "- red circle south",
        "student_cot": "<think>So 2.</think><answer>2</answer>",
    }
    return {**row, **changes}


def problem(number=0, **changes):
    row = {
        "images": ["images/good.png"],
        "data_source": "shapes/count",
        "prompt": [{"role": "user", "content": "<image>How many?"}],
        "teacher_response": RESPONSE,
        "answer": "1",
        "reward_model": {"ground_truth": "1", "style": "rule"},
        "extra_info": {"id": f"p{number}"},
    }
    return {**row, **changes}


def without(row, *names):
    return {key: value for key, value in row.items() if key not in names}
