"""The report: a comparison as an HTML page."""
