"""`report.html`: what an evaluation found, as one file that needs no server, no network and no program but a browser."""

from __future__ import annotations

from saelens_cosine.report.html.data import ReportData
from saelens_cosine.report.html.features import features_for_report
from saelens_cosine.report.html.page import render, write_report

__all__ = ["ReportData", "features_for_report", "render", "write_report"]
