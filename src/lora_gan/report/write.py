"""Command ``report``, and the report that ``fit`` ends with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lora_gan.atomic import atomic_file
from lora_gan.errors import LoraGANError
from lora_gan.report.page import page
from lora_gan.report.run import read_run

log = logging.getLogger("lora_gan")

REPORT = "report.html"


def report(runs: list[str], output: str | None = None) -> None:
    """Write what is known of runs to one HTML file that needs no network and no script.

    Args:
        runs: Folders of runs, such as lightning_logs/gan/version_0; several are shown side by side.
        output: The file; report.html in the folder of the first run if it is not given.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise LoraGANError(
                f"{folder} is not the folder of a run: it has no config.yaml; fit names the folder in its last lines, "
                "such as lightning_logs/gan/version_0"
            )
    if not folders:
        raise LoraGANError("report needs the folder of a run, such as lightning_logs/gan/version_0")
    path = Path(output) if output else folders[0] / REPORT
    write_page(folders, path)
    print(path)


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Read runs and write their page."""
    text = page([read_run(folder) for folder in folders])
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_report(folder: Path) -> Path | None:
    """Write ``report.html`` into a run's folder; None, with a warning, where that fails: the run itself is complete."""
    try:
        write_page([folder], folder / REPORT)
    except Exception as error:
        log.warning("the report of the run could not be written (%s: %s)", type(error).__name__, error)
        return None
    return folder / REPORT
