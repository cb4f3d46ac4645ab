"""Files, devices and reporting: everything a run needs that is not arithmetic."""
