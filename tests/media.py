"""Small files of images and videos, with what is said of them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SENTENCES = {"dev": ["there is a blue tower", "a red box"], "test": ["there is no box"], "hidden": ["a tower"]}


def picture(colour: int) -> bytes:
    """Return a PNG of one red."""
    content = io.BytesIO()
    Image.new("RGB", (40, 10), (colour, 0, 0)).save(content, "PNG")
    return content.getvalue()


def jpeg(height: int, width: int) -> bytes:
    """Return a grey JPEG image; several, one after another, are a video in the format MJPEG."""
    content = io.BytesIO()
    Image.new("RGB", (width, height), (100, 100, 100)).save(content, "JPEG")
    return content.getvalue()


def write_nlvr(folder: Path) -> None:
    """Write three files of sentences, and their images, each of one red: 100 x file + 10 x sentence + order."""
    (folder / "nlvr").mkdir()
    with zipfile.ZipFile(folder / "nlvr/nlvr_images.zip", "w") as images:
        for place, (split, sentences) in enumerate(SENTENCES.items()):
            lines = list[str]()
            for number, sentence in enumerate(sentences):
                boxes = [[], [{"color": "Yellow", "type": "square"}] * number, [{"color": "#0099ff", "type": "circle"}]]
                entry = {"identifier": f"{number}-1", "sentence": sentence, "label": "true" if number else "false"}
                entry |= {"structured_rep": boxes}
                lines.append(json.dumps(entry))
                for order in range(6):
                    images.writestr(f"{split}-{number}-1-{order}.png", picture(100 * place + 10 * number + order))
            (folder / f"nlvr/{split}.jsonl").write_text("\n".join(lines) + "\n")


SIDE = 32
LEVELS = (10, 40, 70, 100, 130, 160, 190, 220)  # grey of the frames of a video


def write_video(path: Path, levels: Sequence[int] = LEVELS, height: int = SIDE, width: int = SIDE) -> None:
    """Encode grey frames, each of one level."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.options = {"qscale": "1"}
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_captions(path: Path, videos: Sequence[str], **more: Any) -> str:
    """Write a JSONL file of captions, and return its path."""
    lines = [json.dumps({"video": one, "caption": f"the {one[:-4]} moves", **more}) for one in videos]
    path.write_text("\n".join(lines) + "\n")
    return str(path)
