"""Pictures of persons: nothing of a header leaves it, no split parts a person, and nobody starts unawares."""

import csv
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pydicom
import pytest
from datasets import Dataset as HubDataset
from PIL import Image
from test_cli import unmemorize
from test_dedup_dicom import read, write

from dedup import subjects
from dedup.export import Options as ExportOptions
from dedup.export import export
from dedup.manifest import read_json
from dedup.options import Options, OptionsError
from dedup.pipeline import deduplicate
from dedup.sources import Layout, SourceError
from dedup.subjects import SubjectError
from defense.data import hold_out

SECRETS = {
    "PatientName": "SENTINEL^NAME",
    "PatientID": "SENTINEL-ID-4711",
    "PatientBirthDate": "19450508",
    "PatientAddress": "SENTINEL STREET 5",
    "OtherPatientIDs": "SENTINEL-OTHER",
    "ReferringPhysicianName": "SENTINEL^PHYSICIAN",
    "AccessionNumber": "SENTINELACC",
    "InstitutionName": "SENTINEL HOSPITAL",
    "StudyDescription": "SENTINEL STUDY",
    "ImageComments": "SENTINEL COMMENT",
}
type Finished = tuple[Path, subprocess.CompletedProcess[str]]  # OUT, and what the program said
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def draw(seed: int, side: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def read_rows(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "manifest" / "*.parquet")


def run(src: Path, out: Path, *, level: str = "hash", understood: bool = True, **options: Any) -> dict:
    key, base = options.pop("subject_key", None), options.pop("base", None)
    chosen = Options(level=level, layout=Layout(**options), base=base)
    return deduplicate(src, out, chosen, jobs=1, understood=understood, subject_key=key)


def list_texts(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file as it is, and the tables and arrays in it as text."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        yield path, path.read_bytes()
        if path.suffix == ".parquet":
            yield path, "\n".join(str(row) for row in pl.read_parquet(path).rows()).encode()
            yield path, b"\n".join(part for row in pl.read_parquet(path).rows() for part in row if type(part) is bytes)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two persons with two slices each, one slice twice under other headers, a file that cannot be read, a report."""
    src = tmp_path_factory.mktemp("hospital") / "src"
    src.mkdir()
    for number, person in enumerate("AABB"):
        own = SECRETS | {"PatientID": SECRETS["PatientID"] + person}
        (src / f"{number}.dcm").write_bytes(write(draw(number), **own))
        (src / f"{number}.txt").write_text(f"slice {number}")
    (src / "copy.dcm").write_bytes(write(draw(0), **SECRETS | {"PatientID": "SENTINEL-ID-4711C"}))
    broken = write(draw(9), **SECRETS).replace(b"SENTINEL COMMENT", b"SENTINEL COMMEN\xff")
    (src / "broken.dcm").write_bytes(broken.replace(b"MONOCHROME2", b"SENTINEL   "))
    (src / "IM0001").write_bytes(read("MR_small.dcm"))
    (src / "README").write_text("no picture")
    return src


@pytest.fixture(scope="module")
def finished(hospital: Path) -> Finished:
    """By the program, at its default level, with the report."""
    out = hospital.parent / "out"
    return out, unmemorize("dedup", hospital, "-o", out, "--i-understand", "--max-bad", 1, "--jobs", 1)


def test_nobody_starts_unawares(hospital: Path, tmp_path: Path) -> None:
    refused = unmemorize("dedup", hospital, "-o", tmp_path / "out")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    for word in ("DICOM", "should not be trained on privacy-sensitive images without protection", "--i-understand"):
        assert word in refused.stderr
    assert not (tmp_path / "out" / "run.json").exists()
    with pytest.raises(SubjectError, match="DICOM"):  # with signatures there
        run(hospital, tmp_path / "out", level="copy", understood=False)


def test_the_warning_is_said_and_recorded(finished: Finished, tmp_path: Path) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert "Warning: diffusion models give back pictures" in done.stderr
    assert read_json(out / "run.json")["medical"] is True
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(png(0))
    assert run(tmp_path / "src", tmp_path / "out", understood=False)["medical"] is False


def test_nothing_of_a_header_is_in_any_result(hospital: Path, finished: Finished, tmp_path: Path) -> None:
    out, done = finished
    assert read_rows(out)["status"].to_list() == ["ok"] * 5 + ["unreadable", "ok"]
    for form in ("parquet", "index"):
        export(out, tmp_path / form, ExportOptions(form))
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in SECRETS.values()]
    assert (out / "report" / "index.html").exists()
    texts = [*list_texts(out), (Path("stderr"), done.stderr.encode()), (Path("stdout"), done.stdout.encode())]
    texts += [(path, path.read_bytes()) for path in (tmp_path / "index").rglob("*") if path.is_file()]
    for path, text in texts:
        for secret in ("SENTINEL", "19450508", *digests):
            for encoded in (secret.encode(), secret.encode("utf-16-le")):
                assert encoded not in text, f"{secret} in {path}"
    assert b"SENTINEL" in b"".join(path.read_bytes() for path in hospital.glob("*.dcm"))
    described = pl.read_parquet(tmp_path / "parquet" / "*.parquet")
    assert "subject" not in described.columns
    assert "SENTINEL" not in str(described.drop("image").rows())


def test_equal_slices_under_other_headers_are_one(hospital: Path, finished: Finished, tmp_path: Path) -> None:
    rows = read_rows(finished[0])
    pair = rows.filter(pl.col("key").is_in(["0.dcm", "copy.dcm"]))
    assert pair["keep"].sum() == 1
    assert pair["reason"].drop_nulls().to_list() == ["pixels"]
    assert rows.filter(keep=True)["key"].str.contains("^[0-3].dcm|copy.dcm|IM0001$").all()
    assert rows["format"].unique().to_list() == ["DICOM"]
    dest = tmp_path / "dest"
    export(finished[0], dest)
    kept = sorted(rows.filter("keep")["key"])
    assert sorted(path.name for path in dest.iterdir() if path.suffix == ".dcm" or path.name == "IM0001") == kept
    for key in kept:  # patient data included: docs/method.md says so
        assert (dest / key).read_bytes() == (hospital / key).read_bytes()


def test_the_patient_is_the_subject(finished: Finished) -> None:
    rows = dict(read_rows(finished[0]).select("key", "subject").rows())
    assert rows["0.dcm"] == rows["1.dcm"]
    assert rows["2.dcm"] == rows["3.dcm"]
    assert len(set(rows.values())) == 5
    assert all(len(subject) == 32 for subject in rows.values())
    counted = read_json(finished[0] / "run.json")["counts"]["subjects"]
    assert (counted["subjects"], counted["rows"], counted["copies_across"]) == (5, 7, 1)
    assert counted["rows_per_subject"] == {"median": 1.0, "most": 2}
    assert "5 persons on 7 images, at most 2 of one; 1 copies stand with two persons." in finished[1].stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures of 8 persons and of nobody; the second half repeats the first three, of other persons."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for number in range(40):
        (folder / f"{number}.png").write_bytes(png(number % 37))
        rows.append((f"{number}.png", f"picture {number}", f"SENTINEL {number % 8}" if number % 5 else ""))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption", "patient"), *rows])
    return folder / "rows.csv"


def test_a_person_is_in_one_component_and_keeps_every_picture(table: Path, tmp_path: Path) -> None:
    plain = run(table, tmp_path / "plain", understood=False)
    assert "subjects" not in plain["counts"]
    recorded = run(table, tmp_path / "out", subject_column="patient")
    before, rows = read_rows(tmp_path / "plain"), read_rows(tmp_path / "out")
    changed = [name for name in rows.columns if not rows[name].equals(before[name])]
    assert changed == ["subject", "component_id"]
    assert rows["subject"].null_count() == 8
    persons = rows.drop_nulls("subject")
    assert persons.group_by("subject").agg(pl.col("component_id").n_unique())["component_id"].to_list() == [1] * 8
    assert recorded["counts"]["subjects"]["without_kept_rows"] == 0
    pairs = pl.read_parquet(tmp_path / "out" / "pairs.parquet").select("a", "b")
    joined = pl.concat([subjects.link_rows(rows["subject"]), pairs])
    assert rows["component_id"].to_list() == brute_force(40, joined.rows())
    same = rows["subject"].to_numpy()[:, None] == rows["subject"].to_numpy()
    together = rows["component_id"].to_numpy()[:, None] == rows["component_id"].to_numpy()
    assert together[same & rows["subject"].is_not_null().to_numpy()].all()
    for share in (0.2, 0.5, 0.8):
        held = rows.with_columns(hold_out(rows, share)).drop_nulls("subject")
        assert held.group_by("subject").agg(pl.col("held_out").n_unique())["held_out"].max() == 1
    for path, text in list_texts(tmp_path / "out"):
        assert b"SENTINEL" not in text, path


def brute_force(n: int, edges: list[tuple[int, int]]) -> list[int]:
    label = list(range(n))
    for _ in range(n):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    return label


def test_the_key_decides_the_hash_and_nothing_else(table: Path, tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(bytes(range(32)))
    other.write_bytes(bytes(32))
    for name in ("one", "two"):
        run(table, tmp_path / name, subject_column="patient", subject_key=key)
    run(table, tmp_path / "own", subject_column="patient")
    one, own = (read_rows(tmp_path / name) for name in ("one", "own"))
    files = ["manifest/00000.parquet", "pairs.parquet", "run.json", "deduplicated.parquet", "kept.txt"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert set(one["subject"].drop_nulls()).isdisjoint(own["subject"].drop_nulls())
    assert one.drop("subject").equals(own.drop("subject"))
    for given in (other, None):
        with pytest.raises(SubjectError, match="another --subject-key"):
            run(table, tmp_path / "one", subject_column="patient", subject_key=given)
    (tmp_path / "own" / ".work" / subjects.KEY).unlink()  # forgotten on purpose: all is hashed anew
    run(table, tmp_path / "own", subject_column="patient")
    again = read_rows(tmp_path / "own")
    assert set(again["subject"].drop_nulls()).isdisjoint(own["subject"].drop_nulls())
    assert again.drop("subject").equals(own.drop("subject"))
    key.write_bytes(b"short")
    with pytest.raises(SubjectError, match="a key needs 16 bytes"):
        run(table, tmp_path / "three", subject_column="patient", subject_key=key)


def test_the_key_of_a_run_is_secret_and_stays(table: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run(table, tmp_path / "out", subject_column="patient")
        path = tmp_path / "out" / ".work" / subjects.KEY
        assert path.stat().st_mode & 0o777 == 0o600
    export(tmp_path / "out", tmp_path / "dest")
    secret = path.read_bytes()
    assert all(secret not in text for file, text in list_texts(tmp_path) if file != path)


def test_a_grown_table_goes_on_with_the_key_of_its_base(table: Path, tmp_path: Path) -> None:
    run(table, tmp_path / "base", subject_column="patient")
    grown = table.with_name("grown.csv")
    grown.write_text(table.read_text() + "39.png,one more,SENTINEL 3\n40.png,missing,SENTINEL 9\n")
    run(grown, tmp_path / "out", subject_column="patient", base=str(tmp_path / "base"))
    before, rows = (read_rows(tmp_path / name)["subject"].to_list() for name in ("base", "out"))
    assert rows[:40] == before
    assert rows[40] == before[3]
    assert rows[41] not in before
    run(grown, tmp_path / "other", subject_column="patient")
    assert set(filter(None, read_rows(tmp_path / "other")["subject"])).isdisjoint(rows)


def test_a_new_subject_in_the_table_is_seen(table: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    src, out = tmp_path / "rows.csv", tmp_path / "out"
    src.write_text("path,who\n0.png,a\n1.png,b\n2.png,b\n")
    run(src, out, subject_column="who")
    assert read_rows(out)["component_id"].to_list() == [0, 1, 1]
    src.write_text("path,who\n0.png,ab\n1.png,ab\n2.png,b\n")
    run(src, out, subject_column="who")
    assert read_rows(out)["component_id"].to_list() == [0, 0, 2]


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_other_tables_have_subjects_too(kind: str, tmp_path: Path) -> None:
    columns = {"image": [png(n) for n in range(4)], "patient": [7, 8, 7, None]}
    if kind == "parquet":
        src = tmp_path / "rows.parquet"
        pl.DataFrame(columns).write_parquet(src)
    else:
        src = tmp_path / "saved"
        HubDataset.from_dict(columns).save_to_disk(src)
    run(src, tmp_path / "out", subject_column="patient")
    assert read_rows(tmp_path / "out")["component_id"].to_list() == [0, 1, 0, 3]
    with pytest.raises(SourceError, match="--subject-column 'person' is not there; it has the columns image, patient"):
        run(src, tmp_path / "none", subject_column="person")


def test_what_goes_wrong_is_said(table: Path, hospital: Path, tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="pictures of persons"):
        run(table, tmp_path / "out", subject_column="patient", understood=False)
    with pytest.raises(SourceError, match="--subject-column 'person' is not there"):
        run(table, tmp_path / "out", subject_column="person")
    with pytest.raises(SourceError, match="--subject-column is of tables"):
        run(hospital, tmp_path / "out", subject_column="patient")
    with pytest.raises(SubjectError, match="nowhere: no such file"):
        run(table, tmp_path / "out", subject_key=tmp_path / "nowhere")
    run(table, tmp_path / "out")
    with pytest.raises(OptionsError, match="subject_column was None"):
        run(table, tmp_path / "out", subject_column="patient")


def test_a_table_and_a_tar_may_name_dicom_files(hospital: Path, tmp_path: Path) -> None:
    (hospital.parent / "rows.csv").write_text("path\nsrc/0.dcm\nsrc/IM0001\n")
    assert run(hospital.parent / "rows.csv", tmp_path / "out")["counts"]["status"] == {"ok": 2}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("0.dcm", "0.txt", "2.dcm"):
            tar.add(hospital / name, name)
    run(tmp_path / "0.tar", tmp_path / "tar")
    assert read_rows(tmp_path / "tar").select("key", "format", "caption").rows() == [
        ("0", "DICOM", "slice 0"),
        ("2", "DICOM", None),
    ]


def test_two_windows_of_one_slice(tmp_path: Path) -> None:
    """No copies to the hash level. The copy level drops a mild change of tone, and keeps what shows other tissue."""
    src = tmp_path / "src"
    src.mkdir()
    for name, windows in (("CT_small", [(100, 2000), (50, 1500)]), ("693_J2KI", [(40, 100), (300, 1500)])):
        header = pydicom.dcmread(io.BytesIO(read(f"{name}.dcm")))
        for centre, width in windows:
            header.WindowCenter, header.WindowWidth = centre, width
            header.save_as(src / f"{name}-{width}.dcm")
    run(src, tmp_path / "hash")
    assert read_rows(tmp_path / "hash")["keep"].all()
    run(src, tmp_path / "copy", level="copy")
    rows = read_rows(tmp_path / "copy")
    assert rows.filter(~pl.col("keep")).select("key", "reason").rows() == [("CT_small-1500.dcm", "copy")]
    assert rows.filter(pl.col("key").str.starts_with("693"))["class"].to_list() == ["look-alike"] * 2
    assert json.loads((tmp_path / "copy" / "run.json").read_text())["counts"]["subjects"]["subjects"] == 2
