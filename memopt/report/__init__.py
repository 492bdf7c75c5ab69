"""What people read: tables. Importing this package makes `print(report)` show one."""

from __future__ import annotations

from memopt.report.table import render_text, report_table
from memopt.types.report import RunReport

RunReport.renderer = staticmethod(render_text)

__all__ = ["RunReport", "render_text", "report_table"]
