"""The demo cohort: generated scans with questions and answers."""
