"""Reports of a run: figures, log, report page, model card."""
