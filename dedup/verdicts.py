"""What comparisons of pictures have said, remembered: a run that was killed, or that decides anew, makes none twice.

A verdict follows from the bytes of the pictures, how they are decoded, what was asked and by which code, and its key is
a digest of these (`Reader.ask`). Other versions of the libraries may judge otherwise: `pipeline` removes the folder
then. In: keys. Out: verdicts as JSON, in parquet files that are written as they come in and become one when a run ends,
without those it did not use.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from dedup import manifest

SCHEMA = {"key": pl.String, "verdict": pl.String}


class Verdicts:
    """Those that lie in a folder, and in others that are only read."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self.folder = folder
        parts = [pl.read_parquet(path) for each in (folder, *others) for path in sorted(each.glob("*.parquet"))]
        self.known = pl.concat([pl.DataFrame(schema=SCHEMA), *parts]).unique("key", keep="first")
        self.used = [pl.Series([], dtype=pl.String)]

    def _list_parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def find(self, keys: Sequence[str]) -> list[str | None]:
        """The verdict of each key, None where none is known."""
        asked = pl.DataFrame({"key": keys}, schema={"key": pl.String})
        self.used.append(asked["key"].unique())
        return asked.join(self.known, on="key", how="left", maintain_order="left")["verdict"].to_list()

    def add(self, keys: Sequence[str], verdicts: Sequence[str]) -> None:
        """Remember new ones."""
        part = pl.DataFrame({"key": keys, "verdict": verdicts}, schema=SCHEMA)
        self._write(part)
        self.known = pl.concat([self.known, part])

    def _write(self, part: pl.DataFrame) -> None:
        parts = self._list_parts()
        number = 1 + int(parts[-1].stem) if parts else 0
        manifest.write_parquet(self.folder / f"{number:08d}.parquet", part)

    def forget(self) -> None:
        """Drop what nobody has asked for since this began, put the rest into one file, and have none in memory."""
        parts = self._list_parts()
        kept = self.known.join(pl.concat(self.used).unique().to_frame("key"), on="key", how="semi").sort("key")
        stored = [pl.read_parquet(path, columns=["key"])["key"] for path in parts]
        if len(stored) != 1 or not stored[0].equals(kept["key"]):
            self._write(kept)
            for path in parts:
                path.unlink()
        self.known, self.used = kept.clear(), self.used[:1]
