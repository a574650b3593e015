"""Report of runs: one HTML file with settings, curves, held-out results, samples and warnings, from a run's folder."""

from lora_gan.report.write import report, write_report

__all__ = ["report", "write_report"]
