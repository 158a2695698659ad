"""What a run says: figures, log, report page, model card."""
