"""An image on which the decoder does not raise but dies, on Ray: one row in quarantine, and everything else as without it."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import command, real_images, run_here, write_recipe

DEADLY = Path(__file__).parents[1] / "deadly"
IMAGES = real_images(60)


def collection(directory: Path, with_killer: bool) -> None:
    """Two files; the killer is in the second one."""
    (directory / "photos").mkdir(parents=True)
    for number in range(2):
        rows = [(row.image, list(row.tags)) for row in IMAGES[number::2]]
        if number and with_killer:
            rows.insert(7, (IMAGES[0].image + b"deadly", ["thin"]))
        columns = {"image": [image for image, _ in rows], "hashtags": [tags for _, tags in rows]}
        pq.write_table(pa.table(columns), directory / "photos" / f"{number}.parquet")
    write_recipe(directory, partition={"experts": 1}, hashtags={"min_count": 2}, execution={"attempts": 2})


def rows_of(root: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path).to_pylist()]


@pytest.mark.long
def test_image_that_kills_its_workers_is_quarantined_and_the_run_goes_on(tmp_path: Path) -> None:
    """It killed every worker that touched it, and with them the run, whatever the number of attempts."""
    collection(tmp_path / "a", with_killer=True)
    path = os.pathsep.join([str(DEADLY), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = command("partition", "--backend", "ray", "--parallel", "2")
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(arguments, cwd=tmp_path / "a", env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "00001-of-00002: lost its worker" in result.stderr and "trying again (1 of 2)" in result.stderr
    assert "trying once more, with what may have killed it in a process of its own" in result.stderr
    root = tmp_path / "a" / "runs" / "small"
    (bad,) = rows_of(root, "dataset/quarantine/*.parquet")
    assert bad == {"source_uri": "1.parquet#row=7", "reason": "decoding it kills the process (SIGKILL)"}

    collection(tmp_path / "b", with_killer=False)
    run_here(tmp_path / "b", "partition")
    other = tmp_path / "b" / "runs" / "small"
    found, expected = (rows_of(each, "dataset/split=*/*.parquet") for each in (root, other))
    assert found == expected and len(found) > 50
