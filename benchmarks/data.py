"""Data: reading batches and tokenising text, against a simple script and Hugging Face datasets."""

from __future__ import annotations

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.reading import DataSetting

TITLE = "Reading batches and tokenising, against a simple script and Hugging Face datasets"


def rows() -> list[Row]:
    """The rows of this question; no figure is set for them."""
    readers = (
        Against("read-simple", "simple reader"),
        Against("read-datasets:rows", "HF datasets, rows"),
        Against("read-datasets:batches", "HF datasets, batches"),
    )
    builders = (Against("build-simple", "simple script"), Against("build-datasets", "HF datasets"))
    return [
        Row(
            "200 batches read",
            "read-ours",
            readers,
            DataSetting(),
            numbers="same",
            note="ours also gives the position and the document of each token",
        ),
        Row(
            "text to token files",
            "build-ours",
            builders,
            DataSetting(),
            numbers="same",
            note="ours also hashes, indexes and flushes to disk",
        ),
    ]


if __name__ == "__main__":
    main("data")
